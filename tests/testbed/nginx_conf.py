"""The text of the hub's nginx configuration: hub with a CDN behind it, mirrors, and the JavaScript that signs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .repos import TOKEN

SECRET = "testbed-secret"
# The CDN by another name than the hub's: huggingface_hub 1.x takes every port of one host for the same server.
CDN_HOST = "localhost"
LONG_S = 3600  # how long a signature of the CDN holds
SHORT_S = 2

#: Name of each server: what it is.
SERVERS = {
    "hub": "redirects large files to the CDN, with a signature that holds an hour",
    "cdn": "checks the signature: 403 when it is wrong or old, 400 when an Authorization header comes along",
    "mirror": "serves every file itself (200, 206), ETag = sha256 or git-sha1",
    "stale": "a mirror whose main is still the first commit",
    "short": "as hub, with signatures that hold two seconds, and the CDN on the hub's own host (another port)",
    "xet": "as hub, with the Xet headers of the real hub (there is no Xet server behind them)",
    "tls": "a mirror under https with a certificate that nobody signed",
}

JAVASCRIPT = """import crypto from 'crypto';
import fs from 'fs';
// The signed address of an LFS object, as secure_link_md5 of the CDN server checks it.
function signed(r) {
  var expires = Math.floor(Date.now() / 1000) + Number(r.variables.signature_s);
  var path = '/lfs/' + r.variables.lfs;
  var signature = crypto.createHash('md5').update(expires + path + ' @SECRET@').digest('base64url');
  var query = '?Expires=' + expires + '&Signature=' + signature;
  return 'http://' + r.variables.cdn_host + ':' + r.variables.cdn_port + path + query;
}
function decoded(text) { return decodeURIComponent(text.replace(/\\+/g, ' ')); }
function wantedPaths(r) {
  var body = r.requestText || '';
  if ((r.headersIn['Content-Type'] || '').indexOf('json') >= 0) return JSON.parse(body).paths;
  return body.split('&').filter(function (pair) { return pair.indexOf('paths=') === 0; })
    .map(function (pair) { return decoded(pair.substring(6)); });
}
// POST /api/models/NS/NAME/paths-info/REV with paths=... as a form or as JSON
function pathsInfo(r) {
  var parts = r.uri.match(/^\\/api\\/models\\/([^\\/]+\\/[^\\/]+)\\/paths-info\\/(.+)$/);
  var wanted = wantedPaths(r), tree;
  try {
    tree = JSON.parse(fs.readFileSync(r.variables.www + '/api/models/' + parts[1] + '/tree/' + parts[2] + '.json'));
  } catch (e) {
    r.headersOut['X-Error-Code'] = 'RevisionNotFound';
    r.return(404, '{}');
    return;
  }
  r.headersOut['Content-Type'] = 'application/json';
  r.return(200, JSON.stringify(tree.filter(function (file) { return wanted.indexOf(file.path) >= 0; })));
}
export default { signed, pathsInfo };
""".replace("@SECRET@", SECRET)

# $u is the decoded path of the request: $uri changes under try_files. Revisions are taken from $request_uri, where a
# slash inside one is still %2F.
_HTTP = """
  map_hash_max_size 65536; map_hash_bucket_size 512; variables_hash_max_size 4096;
  map $u $repo_key { default ""; "~^/api/models/(?<a>[^/]+/[^/]+)" $a; "~^/(?<b>[^/]+/[^/]+)/(resolve|raw)/" $b; }
  map $request_uri $rev_key { default ""; "~^/(?<c>[^/]+/[^/]+)/resolve/(?<d>[^/?]+)/" "$c $d"; }
  map "$repo_key $http_authorization" $denied { default 0;
    "~^[^/]+/(private|gated)-.* Bearer @TOKEN@$" 0; "~^[^/]+/private-" missing; "~^[^/]+/disabled-" disabled;
    "~^[^/]+/gated-[^ ]* .+$" gated403; "~^[^/]+/gated-" gated401; }
  map $file $etag { default ""; "~^/(lfs|git)/(?<e>.+)$" $e; }
  map $file $lfs { default ""; "~^/lfs/(?<f>.+)$" $f; }
  map $stale_file $stale_etag { default ""; "~^/(lfs|git)/(?<g>.+)$" $g; }
  map $cursor $next_page { default ""; "~.+" '<$scheme://$http_host$u$cursor>; rel="next"'; }
  map $arg_cursor $page { default ""; "~^(?<n>[0-9]+)$" ".$n"; }
  js_path @FOLDER@; js_import hub from hub.js; js_set $signed hub.signed;
""".replace("@TOKEN@", TOKEN)

# 461 to 466 are private codes of this file: each leads to the answer that the real hub gives.
_ANSWERS = """
    set $u $uri;
    error_page 461 = @no_repo; error_page 462 = @gated401; error_page 463 = @gated403;
    error_page 464 = @no_revision; error_page 465 = @no_entry; error_page 466 = @disabled;
    location @no_repo {
      add_header X-Error-Code RepoNotFound always; add_header X-Error-Message "Repository not found" always;
      if ($http_authorization != "") {
        add_header X-Error-Code RepoNotFound always; add_header X-Error-Message "Repository not found" always;
        return 404 '{"error":"Repository not found"}'; }
      return 401 '{"error":"Invalid username or password."}'; }
    location @gated401 { add_header X-Error-Code GatedRepo always; add_header X-Error-Message
      "Access to model is restricted. You must have access to it and be authenticated to access it." always;
      return 401 'restricted'; }
    location @gated403 { add_header X-Error-Code GatedRepo always; add_header X-Error-Message
      "Access to model is restricted and you are not in the authorized list." always; return 403 'restricted'; }
    location @disabled { add_header X-Error-Message "Access to this resource is disabled." always;
      return 403 '{"error":"Access to this resource is disabled."}'; }
    location @no_revision { add_header X-Error-Code RevisionNotFound always;
      add_header X-Error-Message "Invalid rev id" always; return 404 '{"error":"Invalid rev id"}'; }
    location @no_entry { add_header X-Error-Code EntryNotFound always; add_header X-Error-Message "Entry not found"
      always; add_header X-Repo-Commit $@P@commit always; return 404 'Entry not found'; }
    location = /api/agent-harnesses { default_type application/json; return 200 '{"harnesses":{}}'; }
    location = /api/whoami-v2 { default_type application/json; return 200 '{"type":"user","name":"tb"}'; }
"""
_OPEN = """if ($denied = missing) { return 461; } if ($denied = disabled) { return 466; }
      if ($known_repo = "") { return 461; }"""
_GUARD = f"{_OPEN} if ($denied = gated401) {{ return 462; }} if ($denied = gated403) {{ return 463; }}"

# The pages of a gated repository are public, its files are not.
_API = """
    location ~ ^/api/models/(?<rid>[^/]+/[^/]+)$ { @OPEN@ default_type application/json;
      root @WWW@; try_files /@P@api/models/$rid/index.json @no_revision; }
    location ~ ^/api/models/(?<rid>[^/]+/[^/]+)/refs$ { @OPEN@ default_type application/json;
      root @WWW@; try_files /@P@api/models/$rid/refs.json @no_revision; }
    location ~ ^/api/models/(?<rid>[^/]+/[^/]+)/revision/(?<rv>.+)$ { @OPEN@ default_type application/json;
      root @WWW@; try_files /@P@api/models/$rid/revision/$rv.json @no_revision; }
    location ~ ^/api/models/(?<rid>[^/]+/[^/]+)/tree/(?<rv>.+?)/?$ { @OPEN@ default_type application/json;
      add_header Link $next_page;
      root @WWW@; try_files /@P@api/models/$rid/@TREE@/$rv$page.json @no_revision; }
""".replace("@OPEN@", _OPEN)

_PLAIN_FILE = """if ($@P@commit = "") { return 464; } if ($@P@file = "") { return 465; }
      @REDIRECT@
      etag off; add_header ETag '"$@P@etag"'; add_header X-Repo-Commit $@P@commit;
      root @WWW@; try_files $@P@file =404;"""

_REDIRECT = """if ($lfs != "") {
        add_header X-Repo-Commit $commit; add_header X-Linked-ETag '"$lfs"'; add_header X-Linked-Size $lfs_size;
        add_header Accept-Ranges bytes; @XET@
        return 302 $signed; }"""

_XET = """add_header X-Xet-Hash $xet;
        add_header Link '<http://$http_host/api/models/$repo_key/xet-read-token/$commit>; rel="xet-auth"';"""

_CDN = """
  server { listen 127.0.0.1:@PORT@; location /lfs/ {
    if ($http_authorization != "") { return 400 'Only one auth mechanism allowed'; }
    secure_link $arg_Signature,$arg_Expires; secure_link_md5 "$secure_link_expires$uri @SECRET@";
    if ($secure_link = "") { return 403 '<Error><Code>AccessDenied</Code></Error>'; }
    if ($secure_link = "0") {
      return 403 '<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'; }
    root @WWW@; @RATE@ } }
""".replace("@SECRET@", SECRET)


def hub_configuration(folder: Path, maps: str, ports: Mapping[str, int], rate_bytes_per_s: int | None) -> str:
    """Return what stands inside ``http {…}``: one server for each name in :data:`SERVERS`.

    Args:
        folder: Holds ``www``, ``hub.js``, ``tls.crt`` and ``tls.key``.
        maps: What :func:`tests.testbed.site.write_site` returned.
        rate_bytes_per_s: The most that one answer of a mirror or of the CDN gets; ``None``: no limit.
    """
    # nginx waits after each piece but the last: with its 2 MB pieces an answer of 8 MiB comes a quarter too fast.
    rate = f"limit_rate {rate_bytes_per_s}; sendfile_max_chunk 256k;" if rate_bytes_per_s else ""
    tls = f" ssl; ssl_certificate {folder}/tls.crt; ssl_certificate_key {folder}/tls.key"
    servers = [
        _redirecting(ports["hub"], CDN_HOST, ports["cdn"], LONG_S),
        _redirecting(ports["short"], "127.0.0.1", ports["cdn"], SHORT_S),
        _redirecting(ports["xet"], CDN_HOST, ports["cdn"], LONG_S, xet=True),
        _serving(str(ports["mirror"]), "", rate),
        _serving(str(ports["stale"]), "stale_", rate),
        _serving(f"{ports['tls']}{tls}", "", rate),
        _CDN.replace("@PORT@", str(ports["cdn"])).replace("@RATE@", rate),
    ]
    text = _HTTP.replace("@FOLDER@", str(folder)) + maps + "".join(servers)
    return text.replace("@WWW@", f"{folder}/www")


def _serving(listen: str, prefix: str, rate: str) -> str:
    file = _PLAIN_FILE.replace("@REDIRECT@", rate)
    text = f"""
  server {{ listen 127.0.0.1:{listen}; {_ANSWERS} {_API}
    location ~ ^/[^/]+/[^/]+/resolve/ {{ {_GUARD} {file} }} }}
"""
    return text.replace("@P@", prefix).replace("@TREE@", "tree")


def _redirecting(port: int, cdn_host: str, cdn_port: int, signature_s: int, *, xet: bool = False) -> str:
    file = _PLAIN_FILE.replace("@REDIRECT@", _REDIRECT.replace("@XET@", _XET if xet else ""))
    text = f"""
  server {{ listen 127.0.0.1:{port}; {_ANSWERS} {_API}
    set $signature_s {signature_s}; set $cdn_host {cdn_host}; set $cdn_port {cdn_port}; set $www @WWW@;
    location ~ ^/api/models/[^/]+/[^/]+/paths-info/ {{ {_GUARD} client_body_buffer_size 1m; js_content hub.pathsInfo; }}
    location ~ ^/[^/]+/[^/]+/resolve/ {{ {_GUARD} {file} }} }}
"""
    return text.replace("@P@", "").replace("@TREE@", "tree-xet" if xet else "tree")
