"""Which packages of an extra are not installed."""

from __future__ import annotations

from importlib import metadata


def missing_packages(extra: str) -> list[str] | None:
    """The packages of ``extra`` that are not installed, by their names on the package index.

    None where that is not known, because Preceptor runs from its source without being installed. What an extra needs is
    read from the package's own metadata, so that there is no second list.
    """
    try:
        requirements = metadata.requires("preceptor") or []
    except metadata.PackageNotFoundError:
        return None
    missing = []
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        if marker.replace('"', "'").strip() == f"extra == '{extra}'":
            package = name.split("[")[0].strip().rstrip("<>=!~,.0123456789 ")
            try:
                metadata.distribution(package)
            except metadata.PackageNotFoundError:
                missing.append(package)
    return missing
