"""All profiles, for tests of each."""

from collections.abc import Mapping

from sbp_assets.settings import PROFILES_DIR, Settings, SettingsError, load_settings

PROFILES = sorted(path.stem for path in PROFILES_DIR.glob("*.yaml"))
SOURCE_PATH = "SBP_EXPERIMENT__CORPUS__SOURCE__PATH"


def load_profile(name: str, environ: Mapping[str, str] | None = None) -> Settings:
    """Return a profile's settings; where it leaves the path of its corpus to the user, that is /corpus."""
    environ = environ or {}
    try:
        return load_settings(name, environ)
    except SettingsError as error:
        if SOURCE_PATH not in str(error):
            raise
        return load_settings(name, {SOURCE_PATH: "/corpus", **environ})
