"""pip-compile, with the hashes that the index itself states: run by lock.py in an environment of its own."""

from pip._internal.models.link import Link
from piptools.repositories.pypi import PyPIRepository
from piptools.scripts.compile import cli

_by_downloading = PyPIRepository._get_file_hash


def _get_file_hash(self: PyPIRepository, link: Link) -> str:
    """The hash on the index page.

    pip-compile asks PyPI's JSON interface and, where an index lacks that, downloads every file of every release that it
    locks, torch's for four systems among them. A simple index states the same hash beside each file.
    """
    if link.hash_name == "sha256" and link.hash:
        return f"sha256:{link.hash}"
    return _by_downloading(self, link)


PyPIRepository._get_file_hash = _get_file_hash  # type: ignore[method-assign]

if __name__ == "__main__":
    cli()
