"""``fastload serve``: a supervisor in front of a model server, or of a hook that makes one.

Read :mod:`.life` (what state it is in, and when it changes), then :mod:`.supervisor` (which does it), then :mod:`.front`
(what HTTP clients see of it). :mod:`.host` is the other process: it runs the user's hook and answers with what that made.
"""
