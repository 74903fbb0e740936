"""The run and event storage's database; the real servers are in operations/."""

import os

import pytest

from sbp_assets.instance.storage import POSTGRES_URL, instance_exists, prepare_instance
from sbp_assets.settings import SettingsError, load_settings


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:planted-password@h/d", "is no postgresql://"),
        ("planted-password", "is no postgresql://"),
        ("postgresql://u:planted@planted-password/x@127.0.0.1:1/d", "is no postgresql://"),
        ("postgresql://u:planted-password@127.0.0.1:notaport/d", "is no postgresql://"),
        ("postgresql://u:planted-password@127.0.0.1:1/d", "127.0.0.1.*port 1 failed"),
        ("postgresql://u:planted-password@127.0.0.1:1/d?options=-csearch_path%3Dx", "PGOPTIONS"),
    ],
)
def test_an_unusable_database_is_refused_without_its_password(url: str, says: str, monkeypatch: pytest.MonkeyPatch):
    settings = load_settings("tiny", dict(os.environ))
    monkeypatch.setenv(POSTGRES_URL, url)
    for use in (prepare_instance, instance_exists):
        with pytest.raises(SettingsError, match=says) as raised:
            use(settings)
        assert "planted-password" not in str(raised.value)
        assert raised.value.__cause__ is None
