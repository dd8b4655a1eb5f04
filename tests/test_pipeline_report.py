"""The report of a pipeline's runs: read back as text, and opened in a real browser."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
import zarr
from PIL import Image

from chainrule.pipeline import artifact
from chainrule.pipeline.artifact import ATTEMPT, partial_folder
from chainrule.pipeline.charts import Level, Node, Series, graph, line_chart, nice_ticks
from chainrule.pipeline.config import RequestError, digest
from chainrule.pipeline.report import write_report
from chainrule.pipeline.stage import Stage

HOSTILE = '<script>document.title="taken"</script> & <b>'


class Runs:
    """A runs folder filled through the same functions that the launcher calls."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifests: dict[str, dict] = {}

    def begin(self, name: str, job: str, inputs: dict[str, str], **config: object) -> Stage:
        folder = partial_folder(self.root / name)
        fingerprint = digest([name, job, inputs])
        stage = Stage(name, self.root.name, job, folder, fingerprint)
        merged = {"job": job, "inputs": inputs, **config}
        (folder / "config.yaml").write_text(yaml.safe_dump(merged))
        attempt = {"fingerprint": fingerprint, "attempts": 1, "seconds": 2.5, "host": "desk"}
        artifact.write_json(folder / ATTEMPT, {**attempt, "start": artifact.now()})
        return stage

    def publish(self, stage: Stage, inputs: dict[str, str], seconds: float = 75.0) -> None:
        manifest = {
            "pipeline": stage.pipeline,
            "stage": stage.name,
            "job": stage.job,
            "fingerprint": stage.fingerprint,
            "inputs": {
                role: [{"stage": n, "fingerprint": self.manifests[n]["fingerprint"], "path": n}]
                for role, n in inputs.items()
            },
            "code": {"version": "0.1.0", "commit": "0123456789abcdef"},
            "metrics": stage.summary,
            "mlflow": {"run_id": digest(stage.name)[:32]},
            "host": "desk",
            "start": artifact.now(),
            "end": artifact.now(),
            "seconds": seconds,
            "attempts": 1,
        }
        self.manifests[stage.name] = manifest
        artifact.publish(self.root / stage.name, manifest)

    def fail(self, stage: Stage, error: str) -> None:
        attempt = artifact.read_json(stage.folder / ATTEMPT)
        artifact.write_json(stage.folder / ATTEMPT, {**attempt, "failed": {"error": error}})


def _ingest(runs: Runs, name: str, modality: str) -> None:
    stage = runs.begin(name, "ingest", {})
    shard = {"name": "shard-000000.tar", "samples": 90, "bytes": 4000, "sha256": ""}
    shards = [{**shard, "split": "train"}, {**shard, "split": "validation", "samples": 10}]
    index = {"format": 1, "kind": "raw", "modality": modality, "shards": shards}
    artifact.write_json(stage.folder / "index.json", index)
    skipped = {"what": "input", "where": "a/<odd>.png", "reason": "not an image"}
    (stage.folder / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    runs.publish(stage, {}, seconds=2.0)


def _tokenizer(runs: Runs, name: str, data: str) -> None:
    stage = runs.begin(name, "train_tokenizer", {"data": data})
    for step in range(0, 600, 10):
        stage.log(step, loss=0.5 * math.exp(-step / 150) + 0.05, codebook_usage=0.9)
    card = {"kind": "vqvae", "health": {"codebook_usage": 0.95, "psnr": 23.1}, "downsampling": 2}
    artifact.write_json(stage.folder / "card.json", card)
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (16, 64), dtype=np.uint8))
    picture.save(stage.folder / "reconstructions.png")
    runs.publish(stage, {"data": data}, seconds=31.0)


def _decoder(runs: Runs, name: str, tokens: str, start: float, end: float) -> None:
    stage = runs.begin(name, "pretrain", {"tokens": tokens})
    rng = np.random.default_rng(0)
    for step in range(1, 1501):
        loss = end + (start - end) * math.exp(-step / 300) + 0.05 * rng.normal()
        values = {"loss": loss, "learning_rate": 1e-3 * min(step / 100, 1.0)}
        if step % 250 == 0:
            values["validation_loss"] = loss + 0.1
        stage.log(step, **values)
    stage.summary |= {"validation_loss": end + 0.1, "context_free_loss": start - 0.4}
    runs.publish(stage, {"tokens": tokens}, seconds=62.0)


def _model(runs: Runs, name: str, decoder: str) -> None:
    stage = runs.begin(name, "handoff", {"decoder": decoder})
    artifact.write_json(stage.folder / "card.json", {"kind": "model", "classes": ["zero", "one"]})
    runs.publish(stage, {"decoder": decoder}, seconds=1.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a pipeline of two branches, with one stage that failed and one unfinished."""
    runs = Runs(tmp_path_factory.mktemp("runs") / "quickstart")
    _ingest(runs, "digits", "image")
    _tokenizer(runs, "digits_tokenizer", "digits")
    inputs = {"data": "digits", "tokenizer": "digits_tokenizer"}
    runs.publish(runs.begin("digits_tokens", "pretokenize", inputs), inputs)
    _decoder(runs, "digits_decoder", "digits_tokens", start=4.1, end=2.3)
    _model(runs, "digits_model", "digits_decoder")

    inputs = {"model": "digits_model"}
    asked = {"number": 20, "temperature": 1.0, "guidance": {"scale": 1.5, "schedule": "constant"}}
    stage = runs.begin("digits_samples", "sample", inputs, **asked)
    store = zarr.open_group(stage.folder / "samples.zarr", mode="w")
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8)
    store.create_array("images", data=pictures)
    store.create_array("class", data=np.arange(20) % 2)
    store.create_array("log_likelihood", data=-30 + rng.normal(size=20))
    runs.publish(stage, inputs)

    _ingest(runs, "code", "text")
    _decoder(runs, "code_decoder", "code", start=7.5, end=3.4)
    _model(runs, "code_model", "code_decoder")
    inputs = {"model": "code_model"}
    stage = runs.begin("code_samples", "sample", inputs, prompts=["def ", "import"])
    (stage.folder / "text").mkdir()
    (stage.folder / "text" / "00000.txt").write_text("def f(x):\n    return x < 1 " + HOSTILE)
    runs.publish(stage, inputs)
    stage = runs.begin("code_evaluation", "evaluate", inputs)
    figures = {"split": "validation", "bits_per_byte": 2.11, "perplexity": 29.9}
    figures |= {"gzip_bits_per_byte": 2.43, "bzip2_bits_per_byte": 2.31, "xz_bits_per_byte": 2.29}
    figures |= {"bits_per_byte.split": "validation", "bits_per_byte.unit": "bits a UTF-8 byte"}
    figures |= {"classifier_agreement": 0.93, "classifier_agreement.class.one": 0.9}
    artifact.write_json(stage.folder / "evaluation.json", figures)
    runs.publish(stage, inputs)

    runs.fail(runs.begin("digits_evaluation", "evaluate", inputs), f"no memory {HOSTILE}")
    late = runs.begin("late_decoder", "pretrain", {"tokens": "digits_tokens"})
    for step in range(1, 40):
        late.log(step, loss=4.0 / step)
    return runs.root


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return write_report(root).read_text()


def test_every_stage_is_in_the_chain_with_its_state_and_time(page: str) -> None:
    nodes = {name: state for state, name in re.findall(r'class="node (\w+)"><title>(\w+):', page)}
    assert len(nodes) == 13
    assert {name for name, state in nodes.items() if state != "done"} == {
        "digits_evaluation",
        "late_decoder",
    }
    assert nodes["digits_evaluation"] == "failed"
    assert nodes["late_decoder"] == "unfinished"
    assert "1 min 2 s" in page


def test_curves_have_validation_and_the_guess(page: str) -> None:
    figures = re.findall(r'<figure class="chart">.*?</figure>', page, flags=re.S)
    curve = next(f for f in figures if "<figcaption>digits_decoder</figcaption>" in f)
    assert curve.count("<polyline") == 2
    assert "best context-free guess <b>3.7</b>" in curve
    assert "loss, nats per token" in curve
    unfinished = next(f for f in figures if "late_decoder (unfinished)" in f)
    assert unfinished.count("<polyline") == 1


def test_a_tokenizer_shows_its_health_and_reconstructions(page: str) -> None:
    section = page[page.index('<section id="tokenizers">') : page.index('<section id="data">')]
    assert "<td>codebook usage</td><td class='n'>0.95 </td>" in section
    assert "23.1 dB" in section
    assert "held-out originals, their reconstructions" in section
    assert 'src="data:image/png;base64,' in section


def test_psnr_across_the_discriminators_start_is_a_main_curve(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "gan")
    for name, adversarial in (("gan", {"start": 200}), ("plain", None)):
        stage = runs.begin(name, "train_tokenizer", {}, adversarial=adversarial)
        for step in range(10, 410, 10):
            stage.log(step, loss=1 / step, psnr=20 + step / 100, commitment=1 / (step + 1))
        stage.log(300, validation_psnr=22.5)
        artifact.write_json(stage.folder / "card.json", {"kind": "vqgan", "health": {}})
        runs.publish(stage, {})
    page = write_report(runs.root, tmp_path / "page.html").read_text()
    main = re.sub(r"<details>.*?</details>", "", page, flags=re.S)
    charts = re.findall(r'<figure class="chart">.*?</figure>', main, flags=re.S)
    [curve] = [chart for chart in charts if "PSNR" in chart]
    assert "gan: PSNR across the discriminator&#x27;s start" in curve
    [(left, right)] = re.findall(r'<line class="level" x1="([\d.]+)" .*?x2="([\d.]+)"', curve)
    assert left == right  # upright
    first, last = 58, 640 - 18
    assert float(left) == pytest.approx(first + (200 - 10) / 390 * (last - first), abs=0.1)
    assert "discriminator&#x27;s start <b>step 200</b>" in curve
    assert "validation <b>22.5</b>" in curve
    folded = "".join(re.findall(r"<details>.*?</details>", page, flags=re.S))
    assert folded.count("<figcaption>psnr, dB") == 1  # of the one without a discriminator
    assert folded.count("<figcaption>commitment") == 2


def test_samples_stand_in_rows_of_the_class_asked_for(page: str) -> None:
    assert "number 20, temperature 1, guidance 1.5" in page
    for label, name in enumerate(("zero", "one")):
        row = re.search(
            rf'<div class="asked">{name}</div><div[^>]*data-class="{label}">(.*?)</div>', page
        )
        assert row is not None
        assert row[1].count("<img") == 10


def test_a_prompt_is_set_apart_from_its_continuation(page: str) -> None:
    assert '<span class="prompt">def </span>f(x):' in page


def test_a_likelihood_stands_beside_the_codecs(page: str) -> None:
    bars = re.search(r"<figcaption>Held-out text.*?</figure>", page, flags=re.S)
    assert bars is not None
    labels = re.findall(r'class="bar-label"[^>]*>([^<]+)<', bars[0])
    assert labels == ["this model", "xz", "bzip2", "gzip"]  # best first
    assert "best of the codecs: xz, 2.29" in page
    assert "<td>validation</td><td class='what'>bits a UTF-8 byte</td>" in page
    assert "93 %" in page


def test_text_from_data_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert (
        page.count("&lt;script&gt;document.title=&quot;taken&quot;&lt;/script&gt; &amp; &lt;b&gt;")
        >= 2
    )
    assert "a/&lt;odd&gt;.png" in page


def test_nothing_is_fetched(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert {s.split(":")[0] if not s.startswith("#") else "#" for s in sources} == {"data", "#"}
    assert not re.findall(r"url\(|@import|https?://", page)


def test_an_artifact_made_from_an_earlier_input_is_stale(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "p")
    _ingest(runs, "data", "text")
    inputs = {"data": "data"}
    runs.publish(runs.begin("tokens", "pretokenize", inputs), inputs)
    again = runs.begin("data", "ingest", {})
    again.fingerprint = digest("other settings")
    runs.publish(again, {})
    page = write_report(runs.root, tmp_path / "page.html").read_text()
    assert '<g class="node stale"><title>tokens: stale' in page
    assert "made from an earlier data" in page


def test_an_empty_runs_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="run the pipeline first"):
        write_report(tmp_path / "nothing")


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(2.31, 4.17) == [2.5, 3.0, 3.5, 4.0]
    assert nice_ticks(1.0, 1.0)


def test_a_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart("t", [Series("a", [(0, 1.0), (1, math.nan), (2, math.inf)])], "x", "y")
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart("t", [Series("a", [(0, math.nan)])], "x", "y", [Level("l", 1.0)]) == ""


def test_the_graph_survives_a_cycle_and_a_missing_input() -> None:
    drawn = graph([Node("a", [], "done", ("b", "gone")), Node("b", [], "done", ("a",))])
    assert drawn.count('<g class="node ') == 2


@pytest.mark.browser
def test_a_browser_opens_it_without_a_complaint(root: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on the path (apt-get install chromium)")
    page = write_report(root, tmp_path / "report.html")
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    switches += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-dev-shm-usage"]
    switches += ["--enable-logging=stderr", "--v=0", "--window-size=1280,4000"]
    shot = tmp_path / "report.png"
    done = subprocess.run(
        [chromium, *switches, f"--screenshot={shot}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    dom = done.stdout
    for anchor in ("chain", "samples", "likelihoods", "curves", "tokenizers", "data", "lineage"):
        assert f'<section id="{anchor}">' in dom
    assert dom.count("<svg") >= 5
    assert "<title>quickstart · chainrule</title>" in dom
    assert "CONSOLE" not in done.stderr
