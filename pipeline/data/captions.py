"""Captions of picture files: texts that a model of pictures can be conditioned on.

Three ways that people keep them:

    beside        cat.jpg and cat.txt, a caption a line (webdataset's and LlamaGen's way)
    *.json        COCO's annotations: images (id, file_name), annotations (image_id, caption)
    *.jsonl       a line a picture: file_name, and text or caption (Hugging Face's imagefolder)

A file lies in the folder or tar of the pictures, or elsewhere on disk. `file_name` is a picture's
path below that folder or below the file's own, or the end of its path where that is of one picture
only: what names another folder is of no picture here.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from chainrule.pipeline.data.sources import SourceError, Tree, Unreadable, tree_files

BESIDE, BESIDE_SUFFIX = "beside", ".txt"
LISTS = (".json", ".jsonl")
HALF_PAIR = re.compile(r"[\ud800-\udfff]")


def check_captions(value: Any) -> Any:
    """`value` again; ValueError where it is neither `beside` nor files of a known form."""
    if value is None or value == BESIDE:
        return value
    if isinstance(value, str | Path) and Path(value).suffix.lower() in LISTS:
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"write {BESIDE}, or a list of files that end in {' or '.join(LISTS)}")
    for path in map(Path, value):
        if path.suffix.lower() not in LISTS:
            raise ValueError(f"{path.name} ends neither in {' nor in '.join(LISTS)}")
    return value


def tidy(caption: str) -> str:
    """A caption as models see it: single spaces between words, none around. What is half of a
    surrogate pair (of text cut in the middle of an emoji) becomes U+FFFD."""
    return " ".join(HALF_PAIR.sub("\ufffd", caption).split())


def caption_files(captions: str | Sequence[Path], root: Path) -> list[Path]:
    """Files that decide the captions, those in a tar left out; SourceError for a missing one."""
    if captions == BESIDE:
        return [] if root.is_file() else tree_files(root, (BESIDE_SUFFIX,))
    tree = Tree(root, LISTS, required=())
    found = (_on_disk(path, tree) for path in map(Path, captions))
    return [path for path in found if path is not None]


class Captions:
    """The captions of each of `names`, pictures in `tree`, which also holds the texts."""

    def __init__(self, captions: str | Sequence[Path], tree: Tree, names: Sequence[str]) -> None:
        self._tree = tree
        self._beside: dict[str, str] | None = None
        self._of: dict[str, list[str]] = {}
        if captions == BESIDE:
            self._beside = {
                str(PurePosixPath(name).with_suffix("")): name
                for name in tree.ending((BESIDE_SUFFIX,))
            }
            if not self._beside:
                raise SourceError(
                    f"{tree.path}: no {BESIDE_SUFFIX} files; captions: {BESIDE} reads cat.txt "
                    "beside cat.jpg"
                )
            return
        pictures = _Pictures(names, tree.path)
        found: dict[str, list[str]] = defaultdict(list)
        unknown = None
        for path in map(Path, captions):
            for file_name, caption in _read(path, tree):
                name = pictures.find(file_name, path)
                text = tidy(caption)
                if name is None:
                    unknown = unknown or file_name
                elif text:
                    found[name].append(text)
        self._of = dict(found)
        if not found and unknown is not None:
            raise SourceError(
                f"{captions[0]}: no caption is of a picture in {tree.path}; its file names are "
                f"like '{unknown}', theirs like '{names[0]}'"
            )
        if not found:
            raise SourceError(f"{captions[0]}: holds no caption")

    def __getitem__(self, name: str) -> list[str]:
        """At least one; Unreadable where there is none."""
        captions = self._of.get(name, []) if self._beside is None else self._lines_beside(name)
        if not captions:
            raise Unreadable("no caption")
        return captions

    def _lines_beside(self, name: str) -> list[str]:
        text = (self._beside or {}).get(str(PurePosixPath(name).with_suffix("")))
        if text is None:
            return []
        try:
            lines = self._tree.read(text).decode("utf-8-sig").split("\n")
        except UnicodeDecodeError:
            raise Unreadable(f"{text}: not UTF-8") from None
        return [tidy(line) for line in lines if line.strip()]


class _Pictures:
    """Pictures by the names that lists of captions have for them."""

    def __init__(self, names: Sequence[str], root: Path) -> None:
        self._root = root
        self._names = set(names)
        self._by_end: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self._by_end[PurePosixPath(name).name].append(name)

    def find(self, file_name: str, listed_in: Path) -> str | None:
        """The picture that a list names, None where it names none of these. SourceError where
        it could be several."""
        name = PurePosixPath(file_name).as_posix()
        folder = listed_in
        if listed_in.is_relative_to(self._root):
            folder = listed_in.relative_to(self._root)
        for whole in (name, (PurePosixPath(folder.as_posix()).parent / name).as_posix()):
            if whole in self._names:
                return whole
        ending = [
            one
            for one in self._by_end[PurePosixPath(name).name]
            if one == name or one.endswith(f"/{name}")
        ]
        if len(ending) > 1:
            raise SourceError(
                f"{listed_in}: '{file_name}' is the name of {len(ending)} pictures, {ending[0]} "
                f"and {ending[1]} among them; write the path below {self._root}"
            )
        return ending[0] if ending else None


def _on_disk(path: Path, tree: Tree) -> Path | None:
    """The file that `path` means, None where it lies in a tar."""
    for candidate in (tree.path / path, path):
        if candidate.is_file():
            return candidate
    if path.as_posix() in tree.names:
        return None
    raise SourceError(f"{path}: no such file, nor in {tree.path}")


def _read(path: Path, tree: Tree) -> Iterator[tuple[str, str]]:
    """(file name, caption) of a file; SourceError where it is not of its form."""
    on_disk = _on_disk(path, tree)
    data = tree.read(path.as_posix()) if on_disk is None else on_disk.read_bytes()
    of_lines = path.suffix.lower() == ".jsonl"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 ({error})") from None
    if not of_lines:
        yield from _in_form(path, text, _coco, "COCO's captions")
        return
    # not splitlines: JSON's strings may hold what that takes for ends of lines
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from _in_form(f"{path}:{number}", line, _line, '{"file_name": …, "text": …}')


def _in_form(
    where: Path | str, text: str, read: Callable[[Any], Iterator[tuple[str, str]]], form: str
) -> Iterator[tuple[str, str]]:
    try:
        yield from read(json.loads(text))
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: not JSON ({error.msg})") from None
    except (KeyError, TypeError, AttributeError) as error:
        fault = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SourceError(f"{where}: not of the form of {form} ({fault})") from None


def _line(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    given = row["caption"] if "caption" in row and "text" not in row else row["text"]
    for caption in given if isinstance(given, list) else [given]:
        if caption is not None:
            yield _text(row["file_name"]), _text(caption)


def _coco(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = {image["id"]: _text(image["file_name"]) for image in content["images"]}
    for annotation in content["annotations"]:
        yield names[annotation["image_id"]], _text(annotation["caption"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
