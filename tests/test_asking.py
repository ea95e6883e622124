"""What a public call asks for, before any network."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastload
from fastload.asking import ask
from fastload.errors import SettingsError, UnsupportedSourceError
from fastload.resolve import find_source
from fastload.testing import Hub


def test_arguments_of_from_pretrained_become_settings(tmp_path: Path):
    options = {"token": "hf_x", "cache_dir": str(tmp_path), "local_files_only": True, "output_attentions": True}
    asked = ask("org/model", options=options)
    assert (asked.settings.token, asked.settings.cache_dir, asked.settings.offline) == ("hf_x", tmp_path, True)
    assert asked.options == {"output_attentions": True}


@pytest.mark.parametrize(("given", "token"), [(True, "hf_env"), (None, "hf_env"), (False, ""), ("hf_arg", "hf_arg")])
def test_token_means_what_it_means_to_huggingface_hub(given: object, token: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_env")
    assert ask("org/model", options={"token": given}).settings.token == token


def test_options_that_choose_files_reach_the_transfer():
    request = ask("org/model", options={"variant": "fp16", "subfolder": None, "output_loading_info": True}).request
    assert request.options == {"variant": "fp16"}


def test_a_wrong_value_names_the_argument():
    with pytest.raises(SettingsError, match="offline='perhaps' \\(argument\\)"):
        ask("org/model", options={"local_files_only": "perhaps"})


def test_one_mirror_needs_no_list():
    assert ask("org/model", mirrors="https://mirror.example/").settings.mirrors == ("https://mirror.example",)


def test_an_empty_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsupportedSourceError, match="no plugin knows the source ''"):
        find_source(ask("").request, ask("").settings, ask("").pm)


def test_files_without_tensors_are_an_error_not_an_empty_dict(hub: Hub):
    with pytest.raises(UnsupportedSourceError, match="files holds tensors"):
        fastload.load_tensors("org/tiny", files="*.json")
