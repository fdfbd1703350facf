"""Check a source archive and a wheel: they hold every file of the package, those behind links as files too.

python tests/check_dist.py FOLDER
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def expected() -> set[str]:
    """Files of the package, as paths inside it; a link to a folder stands for its files."""
    found = set()
    for path in (ROOT / "pyro_nbvae").rglob("*.py"):
        found.add(path.relative_to(ROOT).as_posix())
    for name in ("models", "guides", "experiments"):
        found |= {f"pyro_nbvae/{name}/{path.name}" for path in (ROOT / name).glob("*.py")}
    return found | {path.relative_to(ROOT).as_posix() for path in (ROOT / "pyro_nbvae").rglob("*.safetensors")}


def main(folder: Path) -> None:
    """End with an error that names the files which are missing, or are links."""
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        names = {"wheel": set(opened.namelist())}
    with tarfile.open(archive) as opened:
        files = {member.name.partition("/")[2]: member for member in opened.getmembers()}
    names["archive"] = {name for name, member in files.items() if member.isfile()}
    problems = [
        f"{name} is not a file in the {kind}" for kind, has in names.items() for name in sorted(expected() - has)
    ]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
