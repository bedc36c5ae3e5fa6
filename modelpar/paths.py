"""Where modelpar's own files are."""

from __future__ import annotations

from pathlib import Path

from modelpar.errors import ConfigError


def config_dir() -> Path:
    """Returns the absolute path of the folder of YAML configs.

    An installed package holds it as `modelpar/configs`; in a checkout, also one installed as editable, it lies beside
    the package. Raises ConfigError when it is at neither place.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "model").is_dir():  # some other package's "configs" may lie beside an installed one
            return folder
    raise ConfigError(f"found no configs, neither at {package / 'configs'} nor at {package.parent / 'configs'}")
