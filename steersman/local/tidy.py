"""Removes a run's folder: `python -m steersman.local.tidy [--keep-released] FOLDER`.

What is kept of a released run is what its model can be judged and told apart by: the model with its card, what was
released, the reports and the manifest. Nothing outside the folder is touched: links are removed, not followed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from steersman.errors import ConfigError, SteersmanError, StorageError

KEPT = ("manifest.yaml", "prepared.json", "summary.json", "usage.json", "report")
"""Beside the folders of release stages."""


def tidy(folder: Path, *, keep_released: bool) -> list[str]:
    """Removes a run's files; doing it again changes nothing.

    Args:
        folder: of the run.
        keep_released: what a release stage wrote stays, and what says how it was made.

    Returns:
        Names of what was removed, relative to the folder.

    Raises:
        ConfigError: the folder is not one of a run.
        StorageError: something cannot be removed.
    """
    if not folder.exists():
        return []
    if not (folder / "manifest.yaml").is_file():
        raise ConfigError(f"{folder} has no manifest.yaml, so it is no run's folder; nothing is removed")
    released = {path.parent.name for path in folder.glob("*/release.json")} if keep_released else set()
    removed = []
    # The manifest goes last: with it, a second try knows the folder.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == "manifest.yaml", path.name)):
        if keep_released and (path.name in KEPT or path.name in released):
            continue
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:
            raise StorageError(f"{path} cannot be removed ({error.strerror}); mend it and try again") from None
        removed.append(path.name)
    if not keep_released:
        folder.rmdir()
    return removed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m steersman.local.tidy", description="Removes a run's folder")
    parser.add_argument("--keep-released", action="store_true", help="leave what a release stage wrote")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        removed = tidy(arguments.folder, keep_released=arguments.keep_released)
    except SteersmanError as error:
        print(f"tidy: {error}", file=sys.stderr)
        return error.exit_code
    print(f"tidy: removed {', '.join(removed) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
