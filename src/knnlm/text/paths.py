"""What an argument names: files, the files of a folder, the matches of a glob. Reads no file."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from knnlm.errors import InvalidTextError, TextNotFoundError
from knnlm.text.ignoring import Ignored, IgnoreRules

_SHOWN_CHARACTERS = 200

OnUnlisted = Callable[[Path, OSError], None]


def path_identity(path: Path) -> str:
    """Return a file's or folder's path with links followed, in characters that UTF-8 can hold."""
    return str(path.resolve()).encode("utf-8", "backslashreplace").decode()


def find_files(
    source: str, on_unlisted: OnUnlisted | None = None, ignored: Ignored | None = None
) -> list[str]:
    """Return the files that a text source stands for, sorted.

    on_unlisted: called with each folder below a folder that cannot be listed, and why; by default
    the source is refused. ignored: counts what .gitignore files leave out of a folder; None to
    read all of it. Raises TextNotFoundError, and InvalidTextError for a .gitignore that is none.
    """
    path = Path(source)
    try:
        if source and path.is_file():
            return [source]
        if source and path.is_dir():
            rules = None if ignored is None else IgnoreRules.around(path)
            return sorted(_Walk(on_unlisted, ignored).files_below(path, rules))
        matches = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 (skips hidden names)
        files = [match for match in matches if Path(match).is_file()]
        reason = "" if files else _absence(source, matches)
    except InvalidTextError:  # of a .gitignore
        raise
    except OSError as error:  # no permission, or a name too long
        place = str(error.filename or source)[:_SHOWN_CHARACTERS]
        files, reason = [], f"{place!r} cannot be looked up ({error.strerror or error})"
    except ValueError as error:  # a name with a NUL in it
        files, reason = [], f"it cannot be looked up ({error})"
    if not files:
        raise not_found(source, reason)
    return files


def not_found(source: str, reason: str) -> TextNotFoundError:
    """Return the error for a text source that names nothing to read."""
    return TextNotFoundError(
        f"text source {source[:_SHOWN_CHARACTERS]!r} must be a file, a folder, a glob "
        "pattern with matches, hf:NAME[:CONFIG][:SPLIT], or - for the standard input, but "
        f"{reason}: check the path"
    )


def _absence(source: str, matches: list[str]) -> str:
    """Return why a text source has no files. Raises OSError for a folder that is not readable."""
    path = Path(source)
    if path.is_symlink() and not path.exists():
        return "it is a link to nothing"
    if source and path.exists():
        return "it is neither a file nor a folder"
    if matches:
        return "its matches are no files"
    for folder in reversed(path.parents):  # glob finds nothing where it may not look
        if glob.has_magic(str(folder)):
            break
        if folder.is_dir():
            next(folder.iterdir(), None)
    return "nothing is there"


@dataclass(frozen=True, slots=True)
class _Walk:
    """A walk through a folder and those below it; see `find_files`."""

    on_unlisted: OnUnlisted | None
    ignored: Ignored | None

    def files_below(self, folder: Path, rules: IgnoreRules | None) -> Iterator[str]:
        """Yield the files; rules: those that hold around the folder."""
        try:
            paths = list(folder.iterdir())
        except OSError as error:
            if self.on_unlisted is None:
                raise
            self.on_unlisted(folder, error)
            return
        resolved = folder.resolve()
        rules = None if rules is None else rules.within(resolved)
        for path in paths:
            if path.name.startswith("."):
                continue
            is_folder = path.is_dir()
            if rules is not None and rules.ignores(resolved / path.name, folder=is_folder):
                self._count(path)
            elif path.is_file():
                yield path.as_posix()
            elif is_folder and not path.is_symlink():
                yield from self.files_below(path, rules)

    def _count(self, path: Path) -> None:
        assert self.ignored is not None
        if path.is_dir():
            self.ignored.folders += not path.is_symlink()
        else:
            self.ignored.files += path.is_file()
