"""What a public call asks for, before any network."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastload.asking import ask
from fastload.errors import SettingsError


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
