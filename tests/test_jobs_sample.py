"""The job `sample`, on tiny models handed off the way `handoff` does it."""

import json
import os
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from chainrule.jobs import sample
from chainrule.jobs.sample import Config, main, open_source, sample_folder, settle
from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import Artifact, ArtifactError, LineageError
from chainrule.pipeline.cli_model import app
from chainrule.pipeline.data.audio import encode_flac
from chainrule.pipeline.models import native_steps
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.sampling import show
from chainrule.pipeline.sampling.drafts import NgramDraft
from chainrule.pipeline.sampling.pictures import contact_sheet, file_stems, sheet_rows
from chainrule.pipeline.sampling.sampler import SamplingError
from chainrule.pipeline.sampling.store import Store, StoreError
from chainrule.pipeline.sampling.text import StopStrings, stream
from chainrule.pipeline.stage import Stage
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.pixels import PixelTokenizer

NAMES = ["cat", "dog", "owl"]


def hand_off(folder: Path, model: Any, tokenizer: Any, **card: Any) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "embedding" in name:
                parameter.mul_(8)  # uneven enough for samples to differ
    tokenizer_card = None
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        tokenizer_card = {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "path": "tokenizer",
        }
        card.setdefault("vocabulary", tokenizer.vocabulary)
        card.setdefault("modality", tokenizer.modality)
    save(model, folder, {"tokenizer": tokenizer_card, "grid": None, "classes": None, **card})
    return folder


TINY = {"layers": 1, "heads": 2, "width": 16, "mlp_width": 16}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build(
        {
            "family": "imagegpt",
            "vocabulary_size": 16,
            "context": 16,
            "event_shape": [4, 4],
            "classes": 3,
            "class_dropout": 0.1,
            **TINY,
        },
        seed=0,
    )
    tokenizer = PixelTokenizer(sample_levels(16))
    return hand_off(
        tmp_path_factory.mktemp("pictures"), model, tokenizer, grid=[4, 4], classes=NAMES
    )


def sample_levels(levels: int) -> Any:
    from chainrule.tokenizers.pixels import PixelSettings

    return PixelSettings(levels=levels)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build({"family": "llama", "vocabulary_size": 258, "context": 60, **TINY}, seed=0)
    return hand_off(tmp_path_factory.mktemp("text"), model, ByteTokenizer())


def stage_for(folder: Path, model: Path, rank: int = 0, world_size: int = 1) -> Stage:
    inputs = {"model": [Artifact.bare(model)]}
    return Stage("samples", "test", "sample", folder, "", inputs, rank, world_size)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "metrics.jsonl"
    }


def read(folder: Path, number: int) -> str:
    return (folder / f"text/{number:05d}.txt").read_bytes().decode()


def test_pictures_of_each_class(pictures: Path, tmp_path: Path) -> None:
    config = Config(number=10, batch_size=4)
    sample_folder(pictures, tmp_path, config)
    store = Store.open(tmp_path)
    tokens, classes = store.read("tokens"), store.read("class")
    assert tokens.shape == (10, 4, 4)
    assert tokens.dtype == np.uint8
    assert classes.tolist() == [0, 1, 2] * 3 + [0]
    assert len(set(store.read("seed").tolist())) == 10
    assert store.read("images").shape == (10, 4, 4, 1)
    np.testing.assert_array_equal(store.read("images")[..., 0], tokens * 17)
    x = torch.from_numpy(tokens.astype(np.int64))
    expected = load(pictures).log_prob(x, torch.from_numpy(classes)).sum(1)
    found = store.read("log_likelihood")
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[1] == 4 + 3 * 68
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "samples.json",
        "samples.zarr",
        "sheet.png",
        "sheets",
    ]
    assert sorted(p.name for p in (tmp_path / "sheets").iterdir()) == [
        f"{name}.png" for name in NAMES
    ]
    with Image.open(tmp_path / "sheets/cat.png") as sheet:  # 4 of the 10 are cats
        assert sheet.size == (4 + 4 * 68, 4 + 68)


def test_sample_17_is_the_same_however_it_is_drawn(pictures: Path, tmp_path: Path) -> None:
    settings = {"number": 30, "samples_per_shard": 8, "temperature": 0.9, "top_p": 0.95}

    def tokens(name: str, config: Config, ranks: int = 1) -> np.ndarray:
        for rank in reversed(range(ranks)):
            main(config, stage_for(tmp_path / name, pictures, rank, ranks))
        return Store.open(tmp_path / name).read("tokens")

    one = tokens("one", Config(**settings))
    for batch_size in (1, 3, 50):
        name = f"batch{batch_size}"
        np.testing.assert_array_equal(one, tokens(name, Config(**settings, batch_size=batch_size)))
    tokens("ranks", Config(**settings), ranks=3)
    assert contents(tmp_path / "ranks") == contents(tmp_path / "one")
    more = tokens("more", Config(**{**settings, "number": 40, "samples_per_shard": 40}))
    np.testing.assert_array_equal(one, more[:30])
    other = tokens("other", Config(**settings, seed=1))
    assert (one != other).any(axis=(1, 2)).all()


@pytest.mark.slow
@pytest.mark.skipif(native_steps.load() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("preset", ["gpt2-debug", "mistral-debug"])
def test_sample_17_is_the_same_in_every_dtype(preset: str, dtype: str, tmp_path: Path) -> None:
    """Prompts of many lengths, alone and in company: not a bit of the likelihoods moves."""
    window = {"window": 20} if preset == "mistral-debug" else {}
    shape = {"vocabulary_size": 258, "context": 120, "layers": 2}
    model = hand_off(tmp_path / "model", build(preset, seed=0, **shape, **window), ByteTokenizer())
    settings: dict[str, Any] = {
        "number": 40,
        "prompts": ["a", "def f(x):", "x" * 30, "y" * 70],
        "length": 24,
        "dtype": dtype,
    }
    found = []
    for batch_size in (1, 3, 40):
        folder = tmp_path / str(batch_size)
        store = Store.open(sample_folder(model, folder, Config(**settings, batch_size=batch_size)))
        found.append([store.read(name) for name in ("tokens", "length", "log_likelihood")])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, same)


def test_where_rounding_depends_on_the_batch_its_size_is_a_setting(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAINRULE_NATIVE", "0")
    settings: dict[str, Any] = {"number": 6, "samples_per_shard": 3, "dtype": "bfloat16"}
    sample.part(Config(**settings, batch_size=1), stage_for(tmp_path, pictures), 0, 2)
    with pytest.raises(StoreError, match="rows drawn together = 1, asked for 3"):
        sample_folder(pictures, tmp_path, Config(**settings))
    sample_folder(pictures, tmp_path, Config(**settings, batch_size=1))
    assert Store.open(tmp_path).header["settings"]["rows drawn together"] == 1


def test_no_more_is_held_in_memory_than_is_shown(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, read_rows = [], []
    decode, read_store = PixelTokenizer.decode, Store.read

    def noted(self: Any, batch: Any) -> Any:
        together.append(len(batch))
        return decode(self, batch)

    def noted_rows(self: Store, name: str, rows: Any = None) -> np.ndarray:
        found = read_store(self, name, rows)
        if name == "images":
            read_rows.append(len(found))
        return found

    monkeypatch.setattr(PixelTokenizer, "decode", noted)
    monkeypatch.setattr(Store, "read", noted_rows)
    sample_folder(pictures, tmp_path, Config(number=90))
    assert max(together) == show.DECODED_TOGETHER
    assert read_rows == [30, 30, 30, 30]  # ten of each class, then each class by itself
    np.testing.assert_array_equal(
        Store.open(tmp_path).read("images")[..., 0], Store.open(tmp_path).read("tokens") * 17
    )


def test_what_a_sheet_leaves_out_is_said() -> None:
    names = [f"class {i % 50}" for i in range(100)]
    rows, note = sheet_rows(100, names)
    assert [label for label, _ in rows] == names[:40]
    assert note == "10 more in sheets/"
    assert sheet_rows(401, None)[1] == "1 more samples in the store"
    assert sheet_rows(400, None)[1] == ""
    images = np.zeros((100, 4, 4, 1), dtype=np.uint8)
    plain, noted = contact_sheet(images, rows), contact_sheet(images, rows, note=note)
    assert noted.size[1] == plain.size[1] + 24
    assert (np.asarray(noted)[plain.size[1] :] < 100).any()  # ink
    assert file_stems(["a/b c", "ü"]) == ["a_b_c", "ü"]
    assert file_stems(["a/b", "A?b"]) == ["0000_a_b", "0001_A_b"]


def test_words_of_other_alphabets_stand_on_sheets() -> None:
    image = np.zeros((1, 4, 4, 1), dtype=np.uint8)
    drawn = [
        np.asarray(contact_sheet(image, [(letter, [0])])).tobytes() for letter in "щдΩλłא\U00010fff"
    ]
    assert len(set(drawn)) == len(drawn)  # one at most is the box that stands for the others


def test_first_texts_and_sounds_are_tracked(text: Path, tmp_path: Path) -> None:
    class Tracker:
        def __init__(self) -> None:
            self.files: list[Path] = []

        def file(self, path: Path) -> None:
            self.files.append(path)

        def metrics(self, *_: Any) -> None: ...

    stage = stage_for(tmp_path, text)
    tracker: Any = Tracker()
    stage.tracker = tracker
    main(Config(number=10, length=5), stage)
    assert [path.name for path in tracker.files] == [f"{i:05d}.txt" for i in range(8)]


def test_classes_by_name_and_guidance(pictures: Path, tmp_path: Path) -> None:
    config = Config(number=4, classes=["owl", 0], guidance=3)
    assert config.guidance.scale == 3
    sample_folder(pictures, tmp_path / "guided", config)
    sample_folder(pictures, tmp_path / "plain", Config(number=4, classes=["owl", 0]))
    guided, plain = Store.open(tmp_path / "guided"), Store.open(tmp_path / "plain")
    assert guided.read("class").tolist() == [2, 0, 2, 0]
    assert (guided.read("tokens") != plain.read("tokens")).any()


def test_names_that_are_numbers(tmp_path: Path) -> None:
    """Classes 1 to 12, sorted as words: 2 is the name of number 4 and the number of '11'."""
    names = sorted(str(n) for n in range(1, 13))
    shape = {"family": "imagegpt", "vocabulary_size": 16, "context": 16, "event_shape": [4, 4]}
    model = build({**shape, "classes": 12, **TINY}, seed=0)
    folder = hand_off(
        tmp_path / "m", model, PixelTokenizer(sample_levels(16)), grid=[4, 4], classes=names
    )
    source = open_source(folder)

    def asked(*classes: int | str) -> list[int] | None:
        return settle(Config(classes=list(classes)), source).classes

    assert asked("2", "12", "0") == [4, 3, 0]  # the name first; '0' names none
    assert asked(0, 12) == [0, 3]  # 12 is a name only
    with pytest.raises(SamplingError, match="2 is the name of class number 4 .* of class '11'"):
        asked(2)
    with pytest.raises(SamplingError, match="no class 13; the model has 12, 0 to 11"):
        asked("13")
    with pytest.raises(SamplingError, match="guidance: .* class_dropout 0 "):
        settle(Config(guidance=2.0), source)


def test_started_again_it_fills_what_is_missing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(number=25, samples_per_shard=5, batch_size=5)
    sample_folder(pictures, tmp_path / "whole", config)
    write, written = Store.write, []

    def write_three(store: Store, shard: int, values: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard)
        write(store, shard, values)

    monkeypatch.setattr(Store, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        sample_folder(pictures, tmp_path / "cut", config)
    assert not (tmp_path / "cut" / "samples.json").exists()
    monkeypatch.setattr(Store, "write", write)
    drawn = []
    block = sample.Work.draw_block

    def noted(work: sample.Work, indices: range) -> Any:
        drawn.append(indices)
        return block(work, indices)

    monkeypatch.setattr(sample.Work, "draw_block", noted)
    sample_folder(pictures, tmp_path / "cut", config)
    assert drawn == [range(15, 20), range(20, 25)]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    sample_folder(pictures, tmp_path / "cut", config)
    assert len(drawn) == 2


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(pictures: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from chainrule.jobs.sample import Config, sample_folder\n"
        "config = Config(number=400, samples_per_shard=10, batch_size=10)\n"
        "sample_folder(Path(sys.argv[1]), Path(sys.argv[2]), config)\n"
    )
    command = [sys.executable, "-c", program, str(pictures), str(tmp_path / "killed")]
    for shards in (1, 17):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if len(list(tmp_path.glob("killed/samples.parts/0*.json"))) >= shards:
                process.send_signal(signal.SIGKILL)
                process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    config = Config(number=400, samples_per_shard=10, batch_size=10)
    sample_folder(pictures, tmp_path / "whole", config)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_command_goes_on_and_another_request_is_refused(
    pictures: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "drawn"
    command = ["sample", pictures, "--n", 400, "--set", "samples_per_shard=10"]
    process = subprocess.Popen(
        [sys.executable, "-m", "chainrule.pipeline", *map(str, command), "-o", str(out)],
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("drawn.partial/samples.parts/0*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    code, message = run(*command, "--seed", 5, "-o", out)
    assert code == 2
    assert "killed or failed `sample` of another request left (other: settings.seed)" in message
    done = len(list(tmp_path.glob("drawn.partial/samples.parts/0*.json")))
    code, message = run(*command, "-o", out)
    assert code == 0, message
    assert 0 < done < 40
    assert run(*command, "-o", tmp_path / "whole")[0] == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "drawn.partial").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupted_command_says_what_is_kept(
    pictures: Path,
    tmp_path: Path,
    run: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    kept: bool,
) -> None:
    def interrupted(config: Config, stage: Stage) -> None:
        if kept:
            (stage.folder / "drawn.txt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "main", interrupted)
    code, said = run("sample", pictures, "-o", tmp_path / "drawn")
    partial = tmp_path / "drawn.partial"
    words = f"{partial}: is kept; the same command goes on from there\n" if kept else ""
    assert (code, said) == (130, words + "interrupted\n")
    assert partial.exists() == kept


def test_a_refused_command_leaves_nothing(
    pictures: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    code, message = run("sample", pictures, "--class", "cow", "-o", tmp_path / "drawn")
    assert code in (1, 2)
    assert "cow" in message
    assert list(tmp_path.iterdir()) == []


def test_characters_that_a_model_never_learned_from_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = CharacterTokenizer("abc ")
    size = tokenizer.vocabulary["size"]
    model = build({"family": "llama", "vocabulary_size": size, "context": 16, **TINY}, seed=0)
    folder = hand_off(tmp_path / "model", model, tokenizer)
    sample_folder(folder, tmp_path / "out", Config(number=2, prompts=["ab Жc🙂", "abc"], length=2))
    said = capsys.readouterr().err
    assert said.count("never learned from") == 1
    assert "'ab Жc🙂' has characters that the model never learned from: 'Ж' '🙂'" in said


def test_a_prompt_that_is_no_utf8_is_refused(text: Path, run: Callable[..., Any]) -> None:
    code, said = run("sample", text, "--prompt", os.fsdecode(b"a\xff"))
    assert code == 2
    assert said.startswith("error: prompts (--prompt): 'a\\udcff': what stands at character 1")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "given",
    [
        ("--prompt", "a", "--set", 'prompts=["b"]'),
        ("--set", "guidance.scale=2", "--set", "guidance.scale=3"),
        ("--set", "guidance.scale=2", "--set", "guidance=3"),
    ],
)
def test_a_setting_is_given_once(text: Path, run: Callable[..., Any], given: Any) -> None:
    code, said = run("sample", text, *given)
    assert code == 2
    name = given[-1].partition("=")[0]
    assert said == f"error: --set {given[-1]}: {name} is given already; give it once\n"


def test_settings_below_one_that_was_given_are_added() -> None:
    from chainrule.pipeline.cli_model import settings

    recording = {"file": Path("a.wav"), "seconds": None}
    found = settings("sample", {"recording": recording}, ["recording.seconds=2"])
    assert (found.recording.file, found.recording.seconds) == (Path("a.wav"), 2)


@pytest.mark.parametrize(
    ("settings", "samples"),
    [([], 1), (["number=3"], 3), (["prompts=[a, b]"], 2), (["prompts=[a, b]", "number=3"], 3)],
)
def test_as_many_texts_stream_as_were_asked_for(
    text: Path, settings: list[str], samples: int
) -> None:
    overrides = [part for setting in [*settings, "length=3"] for part in ("--set", setting)]
    done = CliRunner().invoke(app, ["sample", str(text), *overrides])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("─" * 40) == samples - 1


def test_a_picture_for_a_model_of_texts_is_refused(
    text: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    code, message = run("sample", text, "--image", tmp_path / "a.png")
    assert code == 2
    assert "the model is not one of pictures" in message


def test_texts(text: Path, tmp_path: Path) -> None:
    prompts: list[str | list[int]] = ["def ", "x", [104, 105]]
    config = Config(number=6, prompts=prompts, length=20, temperature=0.8)
    sample_folder(text, tmp_path, config)
    store = Store.open(tmp_path)
    texts = [read(tmp_path, i) for i in range(6)]
    assert [t.startswith(p) for t, p in zip(texts, ["def ", "x", "hi"] * 2, strict=True)]
    assert store.read("tokens").shape == (6, 24)
    assert "class" not in store.arrays
    lengths = store.read("length")
    for row in range(6):
        x = torch.from_numpy(store.read("tokens")[row : row + 1, : lengths[row]].astype(np.int64))
        expected = float(load(text).log_prob(x).detach().sum())
        assert store.read("log_likelihood")[row] == pytest.approx(expected, rel=1e-5)
    assert not (store.read("tokens") == 256).any()  # bos is never said


def test_text_ends_at_eos_and_at_stop_strings(text: Path, tmp_path: Path) -> None:
    free = sample_folder(text, tmp_path / "free", Config(number=20, prompts=["a"]))
    lengths = Store.open(free).read("length")
    said = Store.open(free).read("tokens")
    assert ((said == 257).sum(1) <= 1).all()
    assert [said[i, n - 1] == 257 or n == 60 for i, n in enumerate(lengths)] == [True] * 20
    texts = [read(free, i) for i in range(20)]
    stop = next(t[8:10] for t in texts if len(t) > 12 and "�" not in t[8:10])
    config = Config(number=20, prompts=["a"], stop=[stop])
    stopped = sample_folder(text, tmp_path / "stopped", config)
    cut = [read(stopped, i) for i in range(20)]
    assert cut == [t[:1] + t[1:].split(stop)[0] for t in texts]
    assert (Store.open(stopped).read("length") < lengths).any()


@pytest.mark.parametrize("stop", ["ab", "x" * 31 + "y", "x" * 50 + "y", "é" * 40 + "y"])
def test_stop_strings_of_any_length(stop: str) -> None:
    finished = StopStrings(ByteTokenizer(), ["never", stop])
    drawn = list(b"before " * 20 + stop.encode())
    said = [finished(0, drawn[:n]) for n in range(1, len(drawn) + 1)]
    assert said == [False] * (len(drawn) - 1) + [True]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("é\\n", "é\n"),
        ("C:\\xyz", "C:\\xyz"),
        ("a\\tb", "a\tb"),
        ("a\\\\n", "a\\n"),
        ("日本\\q\\", "日本\\q\\"),
    ],
)
def test_what_is_typed_as_a_prompt(typed: str, meant: str) -> None:
    from chainrule.pipeline.cli_model import unescaped

    assert unescaped(typed) == meant


def test_the_command_draws_from_a_transformers_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chainrule.pipeline.cli_model import sample as command
    from chainrule.pipeline.models.transformers_format import to_transformers

    to_transformers(build("llama-debug", seed=0, context=40), tmp_path / "model")
    command(tmp_path / "model", n=2, out=tmp_path / "out")
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert Store.open(tmp_path / "out").read("tokens").shape == (2, 40)


def test_streamed_text_is_the_stored_text(text: Path, tmp_path: Path) -> None:
    source = open_source(text)
    for number, stop in enumerate([[], ["a"], ["ab", "�"]]):
        config = Config(number=3, prompts=["def ", "x"], length=40, stop=stop, seed=3)
        folder = sample_folder(text, tmp_path / str(number), config)
        request = settle(config, source)
        for i in range(3):
            prompt = request.prompts[i % 2]
            pieces = list(
                stream(source.model, source.tokenizer, prompt, 40, request.rules, 3, stop, index=i)
            )
            assert ["def ", "x"][i % 2] + "".join(pieces) == read(folder, i)
            assert stop or len(pieces) > 5


def test_sound(tmp_path: Path) -> None:
    tokenizer = MuLawTokenizer(MuLawSettings(), 16000)
    size = tokenizer.vocabulary["size"]
    model = build({"family": "llama", "vocabulary_size": size, "context": 50, **TINY}, seed=0)
    folder = hand_off(tmp_path / "model", model, tokenizer)
    sample_folder(folder, tmp_path / "out", Config(number=2))
    audio = Store.open(tmp_path / "out").read("audio")
    assert audio.shape == (2, 50)
    assert audio.dtype == np.int16
    with wave.open(str(tmp_path / "out/audio/00001.wav")) as file:
        assert file.getframerate() == tokenizer.card()["sample_rate"]
        frames = np.frombuffer(file.readframes(50), dtype="<i2")
    np.testing.assert_array_equal(frames, audio[1])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_recording_is_continued(
    bits: Literal[8, 16], tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    tokenizer = MuLawTokenizer(MuLawSettings(bits=bits), 1000)
    model = build({"family": "llama", "vocabulary_size": 256, "context": 80, **TINY}, seed=0)
    folder = hand_off(tmp_path / "model", model, tokenizer)
    wave_ = np.sin(np.arange(60) / 3) * 20_000
    (tmp_path / "mine.flac").write_bytes(encode_flac(wave_.astype(np.int16), 1000))
    kept, per_sample = 20, bits // 8
    command = ["sample", folder, "--audio", tmp_path / "mine.flac", "--n", 2]

    code, message = run(*command, "--seconds", kept / 1000, "-o", tmp_path / "out")
    assert code == 0, message
    store = Store.open(tmp_path / "out")
    assert store.read("audio").shape == (2, 80 // per_sample)
    given = tokenizer.encode([wave_.astype(np.int16)[:kept]])[0]
    tokens = store.read("tokens")
    assert (tokens[:, : kept * per_sample] == given).all()
    assert (tokens[0, kept * per_sample :] != tokens[1, kept * per_sample :]).any()

    code, message = run(*command, "-o", tmp_path / "half")
    assert code == 0, message
    half = tokenizer.encode([wave_.astype(np.int16)])[0][:40]  # of what the model makes
    assert (Store.open(tmp_path / "half").read("tokens")[:, :40] == half).all()

    for more, said in (
        (("--seconds", 9), "some must be left to draw; set seconds"),
        (("--set", "prompts=[[1, 2]]"), "recording, prompts, complete: give one of them"),
    ):
        code, message = run(*command, *more, "-o", tmp_path / "refused")
        assert code == 2
        assert said in message


@pytest.mark.parametrize("bits", [8, 16])
def test_a_wavenet_goes_on_beyond_what_it_was_trained_on(
    bits: Literal[8, 16], tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    tokenizer = MuLawTokenizer(MuLawSettings(bits=bits), 1000)
    spec = {"preset": "wavenet-debug", "event_shape": [24], "vocabulary_size": 256}
    model = build(spec, seed=0).eval()
    folder = hand_off(tmp_path / "model", model, tokenizer)
    (tmp_path / "mine.flac").write_bytes(encode_flac(np.arange(60).astype(np.int16), 1000))

    code, message = run("sample", folder, "--n", 3, "--length", 200, "-o", tmp_path / "out")
    assert code == 0, message
    store = Store.open(tmp_path / "out")
    assert store.read("audio").shape == (3, 200 * 8 // bits)
    tokens = torch.from_numpy(store.read("tokens").astype(np.int64))
    exact = build({**spec, "event_shape": [200]}, seed=0).eval()
    with torch.no_grad():
        expected = exact.log_prob(tokens).double().sum(dim=1)
    np.testing.assert_allclose(store.read("log_likelihood"), expected, rtol=1e-5)
    assert run("gallery", tmp_path / "out", "--model", folder)[0] == 0

    audio = ("--audio", tmp_path / "mine.flac", "--seconds", 0.05, "--length", 30)
    code, message = run("sample", folder, *audio, "--n", 1, "-o", tmp_path / "longer")
    assert code == 0, message
    kept = tokenizer.encode([np.arange(50).astype(np.int16)])[0]
    found = Store.open(tmp_path / "longer").read("tokens")
    assert found.shape == (1, len(kept) + 30)
    assert (found[0, : len(kept)] == kept).all()

    bound = {"family": "llama", "vocabulary_size": 256, "context": 24, **TINY}
    other = hand_off(tmp_path / "bound", build(bound, seed=0), tokenizer)
    for more in (("--length", 200), audio):
        code, message = run("sample", other, *more, "-o", tmp_path / "refused")
        assert (code, message.count("\n")) == (2, 1)
        assert "are asked of a model of 24: family 'llama'" in message


def test_recordings_that_cannot_be_continued(
    pictures: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound")
    code, message = run("sample", pictures, "--audio", tmp_path / "a.wav", "-o", tmp_path / "out")
    assert (code, message.count("\n")) == (2, 1)
    assert "recording: the model is not one of sound" in message
    code, message = run("sample", pictures, "--seconds", 1, "-o", tmp_path / "out")
    assert code == 2
    assert "--seconds: says what is kept of --audio" in message

    model = build({"family": "llama", "vocabulary_size": 256, "context": 80, **TINY}, seed=0)
    folder = hand_off(tmp_path / "model", model, MuLawTokenizer(MuLawSettings(), 1000))
    (tmp_path / "b.flac").write_bytes(encode_flac(np.zeros(30, np.int16), 1000))
    for name, said in (
        ("a.wav", "a.wav: damaged"),
        ("b.flac", "b.flac: is 0.03 s long, 0.04 s are to be kept; set seconds to 0.03 or less"),
        ("none.wav", "none.wav: No such file"),
    ):
        code, message = run("sample", folder, "--audio", tmp_path / name, "-o", tmp_path / "out")
        assert code == 2
        assert said in message


def test_real_numbers_without_a_tokenizer(tmp_path: Path) -> None:
    folder = hand_off(tmp_path / "model", build("made-mog-debug", seed=0), None)
    sample_folder(folder, tmp_path / "out", Config(number=5))
    store = Store.open(tmp_path / "out")
    x = torch.from_numpy(store.read("tokens"))
    assert x.dtype == torch.float32
    expected = load(folder).log_prob(x).sum(1).detach().numpy()
    np.testing.assert_allclose(store.read("log_likelihood"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(SamplingError, match="only temperature applies"):
        sample_folder(folder, tmp_path / "cut", Config(number=5, top_k=3))


@pytest.mark.parametrize(
    ("which", "settings", "message"),
    [
        ("pictures", {"classes": [3]}, "no class 3; the model has 3, 0 to 2"),
        ("pictures", {"classes": ["owk"]}, "no class 'owk'; did you mean 'owl'"),
        ("pictures", {"prompts": ["hello"]}, "not one of text"),
        ("pictures", {"length": 5}, "a picture of this model has 16 elements"),
        ("pictures", {"prompts": [[3, 99]]}, r"token 99 lies outside .* image \[0, 16\)"),
        ("pictures", {"stop": ["x"]}, "stop strings are for text"),
        ("pictures", {"end_at": ["eos"]}, "no special token 'eos'"),
        ("text", {"end_at": ["eoss"]}, "no special token 'eoss'; did you mean 'eos'"),
        ("text", {"classes": [0]}, "trained without classes"),
        ("text", {"guidance": 2.0}, "guidance: the model has no classes"),
        ("text", {"length": 61}, "61 elements are asked of a model of 60"),
        ("text", {"prompts": ["x" * 60]}, "a prompt of 60 tokens leaves nothing to draw"),
        ("text", {"prompts": [[258]]}, r"token 258 .* text \[0, 256\), specials \[256, 258\)"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(
    which: str,
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(which)
    with pytest.raises(SamplingError, match=message):
        sample_folder(folder, tmp_path / "out", Config(**settings))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"top_p": 0}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"number": 0}, "number"),
        ({"stop": [""]}, "stop"),
        ({"guidance": {"scale": 2, "shedule": "linear"}}, "shedule"),
    ],
)
def test_nonsense_is_refused_before_a_model_is_read(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=name):
        Config(**settings)


def test_an_altered_model_is_refused(pictures: Path, tmp_path: Path) -> None:
    import shutil

    weights = shutil.copytree(pictures, tmp_path / "weights")
    content = bytearray((weights / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (weights / "weights.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        sample_folder(weights, tmp_path / "out", Config())
    tokenizer = shutil.copytree(pictures, tmp_path / "tokenizer")
    PixelTokenizer(sample_levels(8)).save(tokenizer / "tokenizer")
    with pytest.raises(SamplingError, match="hand the model off again"):
        sample_folder(tokenizer, tmp_path / "out", Config())
    with pytest.raises(ArtifactError, match="no such folder"):
        sample_folder(tmp_path / "nothing", tmp_path / "out", Config())


def test_the_samples_of_another_model_are_not_touched(
    pictures: Path, text: Path, tmp_path: Path
) -> None:
    sample_folder(pictures, tmp_path, Config(number=3))
    before = contents(tmp_path)
    ours, theirs = (json.loads((f / "card.json").read_text()) for f in (pictures, text))
    with pytest.raises(
        LineageError, match=f"{ours['fingerprint'][:16]}.*{theirs['fingerprint'][:16]}"
    ):
        sample_folder(text, tmp_path, Config(number=3))
    with pytest.raises(StoreError, match="temperature = 1.0, asked for 0.5"):
        sample_folder(pictures, tmp_path, Config(number=3, temperature=0.5))
    assert contents(tmp_path) == before


def test_neither_trainer_nor_engines_are_imported(pictures: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from chainrule.jobs.sample import Config, sample_folder\n"
        "sample_folder(Path(sys.argv[1]), Path(sys.argv[2]), Config(number=2))\n"
        "heavy = ('deepspeed', 'accelerate', 'transformers', 'mlflow', 'sklearn', 'webdataset',\n"
        "         'chainrule.pipeline.training', 'chainrule.pipeline.launch')\n"
        "print([m for m in sys.modules if m.startswith(heavy)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(pictures), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "[]"


def test_an_opened_source_is_ready_to_draw(pictures: Path) -> None:
    source = open_source(pictures, "cpu")
    assert not source.model.training
    assert source.elements == 16


@pytest.mark.parametrize(
    "draft", [{"kind": "ngram"}, {"kind": "layers", "layers": 1}, {"kind": "model"}]
)
def test_a_draft_changes_nothing_of_a_greedy_sample(
    draft: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    # With a seed: of some weights the texts never repeat, and an n-gram draft proposes nothing.
    shape = {"family": "llama", "vocabulary_size": 258, "context": 60, **TINY, "layers": 3}
    deep = build(shape, seed=0)
    model = hand_off(tmp_path / "model", deep, ByteTokenizer())
    settings: dict[str, Any] = {
        "number": 5,
        "prompts": ["def ", "x"],
        "temperature": 0,
        "batch_size": 3,
        "stop": ["ab"],
    }
    plain = sample_folder(model, tmp_path / "plain", Config(**settings))
    stage = stage_for(tmp_path / "drafted", model)
    if draft["kind"] == "model":
        stage.inputs["draft"] = [Artifact.bare(text)]  # type: ignore[index]
    main(Config(**settings, draft=draft), stage)
    assert "acceptance" in stage.summary
    for name in ("tokens", "length"):
        np.testing.assert_array_equal(
            Store.open(tmp_path / "drafted").read(name), Store.open(plain).read(name)
        )


def test_drafts_that_cannot_be_are_refused(text: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="takes a draft model"):
        sample_folder(text, tmp_path / "a", Config(draft={"kind": "model"}))
    with pytest.raises(SamplingError, match="draft: layers is 1"):
        sample_folder(text, tmp_path / "b", Config(draft={"kind": "layers", "layers": 1}))
    stage = stage_for(tmp_path / "c", text)
    stage.inputs["draft"] = [Artifact.bare(pictures)]  # type: ignore[index]
    with pytest.raises(LineageError, match="tokenizers of model and draft"):
        main(Config(), stage)


def token_shards(folder: Path) -> np.ndarray:
    """Six grids of 4 x 4 levels as token shards, 3 for training and 3 for validation."""
    from chainrule.pipeline.data.shards import ShardWriter, finish, key_of

    tokenizer = PixelTokenizer(sample_levels(16))
    folder.mkdir()
    rng = np.random.default_rng(0)
    grids: np.ndarray = rng.integers(0, 16, (6, 4, 4)).astype(np.uint8)
    for number, split in enumerate(("train", "validation")):
        with ShardWriter(folder, number, split) as shard:
            for i, grid in enumerate(grids[3 * number : 3 * number + 3]):
                members = {"tokens.npy": grid, "json": {"label": i, "class": NAMES[i]}}
                shard.write(key_of(3 * number + i), members, tokens=16)
    finish(
        folder,
        kind="tokens",
        modality="image",
        shards=2,
        classes=NAMES,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"fingerprint": tokenizer.fingerprint, "kind": "pixels"},
        grid=[4, 4],
        source="0" * 64,
    )
    return grids


def test_real_pictures_are_completed(pictures: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    grids = token_shards(tokens)
    stage = stage_for(tmp_path / "out", pictures)
    stage.inputs["tokens"] = [Artifact.bare(tokens)]  # type: ignore[index]
    main(Config(number=6, complete={"share": 0.5, "of": 2}), stage)
    store = Store.open(tmp_path / "out")
    made = store.read("tokens").reshape(6, 16)
    np.testing.assert_array_equal(made[:, :8], grids[[3, 4] * 3].reshape(6, 16)[:, :8])
    assert len(np.unique(made[::2, 8:], axis=0)) == 3
    assert store.read("class").tolist() == [0, 1] * 3
    with Image.open(tmp_path / "out/sheet.png") as sheet:
        assert sheet.size[1] == 4 + 2 * 68
    with pytest.raises(SamplingError, match="takes a pretokenize artifact"):
        sample_folder(pictures, tmp_path / "none", Config(complete={"share": 0.5}))


def test_an_ngram_draft_looks_through_the_training_split(pictures: Path, tmp_path: Path) -> None:
    grids = token_shards(tmp_path / "tokens")

    def opened(name: str, draft: dict[str, Any]) -> sample.Work:
        stage = stage_for(tmp_path / name, pictures)
        stage.inputs["tokens"] = [Artifact.bare(tmp_path / "tokens")]  # type: ignore[index]
        return sample.Work.open(Config(number=3, temperature=0, draft=draft), stage)

    draft = opened("drafted", {"kind": "ngram", "corpus": 1000}).draft
    assert isinstance(draft, NgramDraft)
    assert draft.texts == grids[:3].reshape(3, 16).tolist()
    stage = stage_for(tmp_path / "drafted", pictures)
    stage.inputs["tokens"] = [Artifact.bare(tmp_path / "tokens")]  # type: ignore[index]
    main(Config(number=3, temperature=0, draft={"kind": "ngram", "corpus": 1000}), stage)
    plain = sample_folder(pictures, tmp_path / "plain", Config(number=3, temperature=0))
    np.testing.assert_array_equal(
        Store.open(tmp_path / "drafted").read("tokens"), Store.open(plain).read("tokens")
    )
    with pytest.raises(SamplingError, match="`corpus` of an n-gram draft; set one of them"):
        opened("unused", {"kind": "ngram"})
    with pytest.raises(SamplingError, match="takes a pretokenize artifact as input `tokens`"):
        sample_folder(pictures, tmp_path / "no", Config(draft={"kind": "ngram", "corpus": 9}))


def drawing(path: Path, height: int, width: int, mode: str = "L") -> Path:
    """A picture file of noise."""
    rng = np.random.default_rng(5)
    shape = (height, width) if mode == "L" else (height, width, 3)
    Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8), mode).save(path)
    return path


@pytest.mark.parametrize(
    ("keep", "kept", "warned"),
    [
        ("top:0.5", np.s_[:2, :], False),
        ("top:0.3", np.s_[:1, :], False),
        ("left:0.5", np.s_[:, :2], True),
        ("outside:0.25,0.5,1,1", np.s_[:2, :], True),
    ],
)
def test_a_picture_of_ones_own_is_completed(
    keep: str,
    kept: Any,
    warned: bool,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = drawing(tmp_path / "own.png", 4, 4)
    levels = PixelTokenizer(sample_levels(16)).encode([np.asarray(Image.open(file))[..., None]])[0]
    config = Config(number=20, classes=["owl"], picture={"file": file, "keep": keep})
    store = Store.open(sample_folder(pictures, tmp_path / "out", config))
    made = store.read("tokens")
    given = np.zeros((4, 4), dtype=bool)
    given[kept] = True
    if keep.startswith("outside"):
        given[2:, 0] = True
    assert (made == levels)[:, given].all()
    assert (made != levels)[:, ~given].any(axis=0).all()
    drawn_before = np.cumsum(~given.ravel()) > 0
    line = f"{(given.ravel() & drawn_before).sum()} of the {given.sum()} kept elements"
    assert (line in capsys.readouterr().err) == warned
    x, cond = torch.from_numpy(made.astype(np.int64)), torch.from_numpy(store.read("class"))
    expected = load(pictures).log_prob(x, cond).sum(1).detach().numpy()
    np.testing.assert_allclose(store.read("log_likelihood"), expected, rtol=1e-5)
    with Image.open(tmp_path / "out/sheet.png") as sheet:  # the picture, then what was made of it
        first = np.asarray(sheet)[4:68:16, sheet.width - 10 * 68 :][:, :64:16, 0]
        np.testing.assert_array_equal(first, levels * 17)


def test_a_picture_coded_by_an_autoencoder_is_completed(tmp_path: Path) -> None:
    from chainrule.pipeline.cli_model import sample as command
    from chainrule.tokenizers.codebooks import Residual
    from chainrule.tokenizers.vqvae import VQVAESettings, VQVAETokenizer

    torch.manual_seed(0)
    small: dict[str, Any] = {"dim": 4, "hidden": 8, "residual_width": 4, "codebook_size": 32}
    settings = VQVAESettings(downsampling=4, quantizer=Residual(depth=2), **small)
    tokenizer = VQVAETokenizer(settings, 3, (16, 16))
    shape = {"family": "imagegpt", "vocabulary_size": 32, "context": 32, "event_shape": [4, 8]}
    model = hand_off(tmp_path / "m", build({**shape, **TINY}, seed=0), tokenizer, grid=[4, 8])
    file = drawing(tmp_path / "own.png", 40, 16, "RGB")  # cut to its middle, as ingest does
    command(model, n=6, image=file, keep="top:0.6", out=tmp_path / "out")
    made = Store.open(tmp_path / "out").read("tokens")
    with Image.open(file) as whole:
        middle = np.asarray(whole.crop((0, 12, 16, 28)))
    codes = tokenizer.encode([middle])[0]
    np.testing.assert_array_equal(made[:, :2], np.stack([codes[:2]] * 6))
    assert (made[:, 2:] != codes[2:]).any()
    # A cell's two codes are kept or drawn together.
    hole = {"file": file, "keep": "outside:0.3,0,0.5,1"}
    given = sample.pictured(Config(picture=hole), open_source(model))
    assert given is not None
    np.testing.assert_array_equal(given.kept.reshape(4, 8)[0], [1, 1, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("which", "asked", "message"),
    [
        ("text", {"file": "own.png"}, "not one of pictures"),
        ("pictures", {"file": "none.png"}, "none.png: No such file"),
        (
            "pictures",
            {"file": "own.png", "keep": "top:0.2"},
            "holds no position of a grid of 4 x 4",
        ),
        ("pictures", {"file": "own.png", "keep": "left:1"}, "holds every position"),
        ("pictures", {"file": "broken.png"}, "broken.png: not a picture of a known format"),
    ],
)
def test_pictures_that_cannot_be_completed(
    which: str,
    asked: dict[str, Any],
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    drawing(tmp_path / "own.png", 4, 4)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    config = Config(picture={**asked, "file": tmp_path / asked["file"]})
    with pytest.raises(SamplingError, match=message):
        sample_folder(request.getfixturevalue(which), tmp_path / "out", config)
    for keep in ("top", "top:2", "outside:0.5,0,0.5,1", "right:0.5", "left:0.1,0.2"):
        with pytest.raises(pydantic.ValidationError, match="keep"):
            Config(picture={"file": "own.png", "keep": keep})


def test_an_array_draws_the_parts_and_main_gathers(pictures: Path, tmp_path: Path) -> None:
    config = Config(number=20, samples_per_shard=3)
    sample_folder(pictures, tmp_path / "whole", config)
    for number in (2, 0, 1):
        sample.part(config, stage_for(tmp_path / "parts", pictures), number, 3)
    assert not (tmp_path / "parts/samples.json").exists()
    stage = stage_for(tmp_path / "parts", pictures)
    main(config, stage)
    assert "elements_per_second" not in stage.summary  # nothing was left to draw
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_int8_weights_and_what_they_lose(text: Path, tmp_path: Path) -> None:
    stage = stage_for(tmp_path, text)
    main(Config(number=4, prompts=["def "], length=30, dtype="int8"), stage)
    assert abs(stage.summary["bits_lost_per_element"]) < 0.05


def test_a_picture_stage_whose_file_is_gone_is_refused_before_it_runs(tmp_path: Path) -> None:
    config = Config.model_validate({"picture": {"file": str(tmp_path / "none.png")}})
    with pytest.raises(SamplingError, match=r"picture: .*none\.png: no such file"):
        sample.source_files(config)
    (tmp_path / "none.png").write_bytes(b"")
    assert sample.source_files(config) == [tmp_path / "none.png"]
