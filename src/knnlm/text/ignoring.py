"""What the .gitignore files in and around a folder leave out of it.

Knows patterns and paths; reads no index of git, so that a file is left out by its patterns alone.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pathspec import GitIgnoreSpec

from knnlm.errors import InvalidTextError


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """The rules that hold in a folder: of each file with patterns, its folder and its patterns.

    The last that say something of a path decide, those of deeper folders after those above them.
    """

    specs: tuple[tuple[Path, Any], ...] = ()

    @classmethod
    def around(cls, folder: Path) -> "IgnoreRules":
        """Return the rules from above a folder: of the git work tree that it lies in, if any.

        None where they leave out the folder itself, which someone asks for by its name. Raises
        InvalidTextError and OSError.
        """
        folder = folder.resolve()
        above = [folder, *folder.parents]
        depths = (depth for depth, each in enumerate(above) if (each / ".git").exists())
        if not (depth := next(depths, 0)):
            return cls()
        rules = cls()
        for each, below in pairwise(reversed(above[: depth + 1])):
            rules = rules.within(each)
            if rules.ignores(below, folder=True):
                return cls()
        return rules

    def within(self, folder: Path) -> "IgnoreRules":
        """Return the rules in a folder, with those of its own files. Raises as `around` does."""
        rules = self
        for file in (folder / ".git" / "info" / "exclude", folder / ".gitignore"):
            rules = rules._with_file(folder, file)
        return rules

    def _with_file(self, folder: Path, file: Path) -> "IgnoreRules":
        if not file.is_file():
            return self
        lines = file.read_bytes().decode("utf-8", "surrogateescape").splitlines()
        try:
            spec = GitIgnoreSpec.from_lines(lines)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise InvalidTextError(
                f"{file} must hold patterns as git reads them ({reason}): correct it, or read "
                "everything with --no-gitignore"
            ) from error
        return replace(self, specs=(*self.specs, (folder.resolve(), spec)))

    def ignores(self, path: Path, *, folder: bool) -> bool:
        """Return whether a file or folder is left out; path: of a folder whose links are resolved.

        What lies in a folder that is left out is left out too, whatever else is said of it.
        """
        end = "/" if folder else ""
        for base, spec in reversed(self.specs):
            said = spec.check_file(path.relative_to(base).as_posix() + end).include
            if said is not None:
                return bool(said)
        return False


@dataclass(slots=True)
class Ignored:
    """How many files and whole folders were left out."""

    files: int = 0
    folders: int = 0
