"""The command line's words become the parts of a request, or are refused with the way they should look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tunepool import requests
from tunepool.connection import Credentials, NoServerKnown, find_credentials


def test_dotted_settings_nest_and_values_are_json_where_they_can_be() -> None:
    settings = ["adapter.r=8", "adapter.method=dora", "training.packing=false", 'adapter.target_modules=["q_proj"]']

    assert requests.nested(settings) == {
        "adapter": {"r": 8, "method": "dora", "target_modules": ["q_proj"]},
        "training": {"packing": False},
    }


@pytest.mark.parametrize("setting", ["adapter.r", "=8", ""])
def test_a_setting_without_a_name_or_a_value_is_refused(setting: str) -> None:
    with pytest.raises(requests.BadSetting, match="NAME=VALUE"):
        requests.nested([setting])


def test_a_setting_below_a_value_is_refused() -> None:
    with pytest.raises(requests.BadSetting, match="has a value already"):
        requests.nested(["adapter=1", "adapter.r=8"])


def test_what_was_not_given_is_not_sent() -> None:
    assert requests.method("supervised", n_epochs=None, batch_size=4) == {
        "type": "supervised",
        "supervised": {"hyperparameters": {"batch_size": 4}},
    }


def test_a_server_named_outright_wins_over_the_home(tmp_path: Path) -> None:
    write_credentials(tmp_path)

    found = find_credentials(tmp_path, base_url="http://there/v1", api_key="theirs")

    assert found == Credentials("http://there/v1", "theirs")


def test_a_key_for_another_service_is_never_sent_to_the_server_of_the_home(tmp_path: Path) -> None:
    write_credentials(tmp_path)

    assert find_credentials(tmp_path, base_url=None, api_key="sk-elsewhere") == Credentials("http://here/v1", "ours")


def test_no_server_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(NoServerKnown, match="OPENAI_BASE_URL"):
        find_credentials(tmp_path, base_url=None, api_key=None)


@pytest.mark.parametrize("text", ["", "[]", "{}", "no json"])
def test_a_broken_credentials_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "credentials.json").write_text(text)

    with pytest.raises(NoServerKnown, match=r"credentials\.json"):
        find_credentials(tmp_path, base_url=None, api_key=None)


def test_a_key_is_not_printed_with_its_credentials() -> None:
    assert "secret" not in repr(Credentials("http://here/v1", "secret"))


def write_credentials(home: Path) -> None:
    (home / "credentials.json").write_text(json.dumps({"base_url": "http://here/v1", "api_key": "ours"}))
