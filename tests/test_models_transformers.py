"""Parity with Hugging Face `transformers`: their random weights in our code and ours in theirs
give the same logits, with and without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import ArtifactError, read_json, write_json
from chainrule.pipeline.models.transformers_format import to_transformers

transformers = pytest.importorskip("transformers")

LENGTH = 24
_LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
_GPT2 = {"vocab_size": 61, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
_FALCON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_GPT2, "bos_token_id": 60, "eos_token_id": 60}),
    "gpt2-untied-relu-free": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            **_GPT2,
            "bos_token_id": 3,
            "eos_token_id": 3,
            "n_inner": 40,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama-grouped-tied": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-scaled-rope-bias": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_LLAMA, "rope_parameters": _SCALED, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 5},
    ),
    "mistral-scaled-rope": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "sliding_window": 9, "rope_parameters": _SCALED},
    ),
    "falcon-7b": ("FalconConfig", "FalconForCausalLM", _FALCON),
    "falcon-40b": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon-sequential": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "imagegpt": ("ImageGPTConfig", "ImageGPTForCausalImageModeling", _GPT2),
}


def _theirs(name: str) -> Any:
    config_class, model_class, settings = THEIRS[name]
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: none may go unseen
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _start(model: Any) -> int:
    config = model.config
    return config.vocab_size - 1 if config.model_type == "imagegpt" else config.bos_token_id


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_their_weights_give_their_logits(name: str, tmp_path: Path) -> None:
    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    size = ours.config.vocabulary_size
    x = torch.randint(size, (3, LENGTH))
    inputs = torch.cat([torch.full((3, 1), _start(theirs)), x[:, :-1]], dim=1)
    wanted = theirs(inputs).logits
    assert _close(ours.conditionals(x).logits, wanted[..., :size])

    cursor = ours.cursor(3)
    steps = [cursor.next.logits.unsqueeze(1), cursor.advance(x[:, :9]).logits]
    steps += [cursor.advance(x[:, t : t + 1]).logits for t in range(9, LENGTH - 1)]
    assert _close(torch.cat(steps, dim=1), wanted[..., :size])


DOCUMENTS = ((7, 1, 10, 6), (LENGTH,), (1, LENGTH - 1))  # elements of each, a row after the other


def _packed(row: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the documents that a row's elements belong to, and places within them."""
    lengths = torch.tensor(row)
    numbers = torch.arange(len(row)).repeat_interleave(lengths)
    return numbers, torch.cat([torch.arange(length) for length in row])


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_packed_rows_give_the_logits_of_each_document_alone(name: str, tmp_path: Path) -> None:
    """No padding on either side: theirs sees one document a call, and then the whole row with
    positions that begin again."""
    theirs = _theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    size = ours.config.vocabulary_size
    x = torch.randint(size, (len(DOCUMENTS), LENGTH))
    numbers, places = (torch.stack(rows) for rows in zip(*map(_packed, DOCUMENTS), strict=True))
    found = ours.conditionals(x, documents=numbers).logits
    shifted = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    inputs = torch.where(places == 0, _start(theirs), shifted)
    for row, lengths in enumerate(DOCUMENTS):
        alone = [theirs(part[None]).logits[0, :, :size] for part in inputs[row].split(lengths)]
        assert _close(found[row], torch.cat(alone))
    # Their masks of Falcon and ImageGPT are not made from positions.
    if theirs.config.model_type not in ("falcon", "imagegpt"):
        packed = theirs(inputs, position_ids=places, use_cache=False).logits
        assert _close(found, packed[..., :size])
    whole = ours.conditionals(x).logits
    assert not _close(found[0], whole[0]), "documents change nothing: the test would prove nothing"


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2-debug", {}),
    "gpt2-bos": ("gpt2-debug", {"bos": 5, "tied_embeddings": False, "activation": "gelu"}),
    "llama": ("llama-debug", {}),
    "llama-bos": ("llama-debug", {"bos": 1, "kv_heads": 4}),
    "llama-scaled": (
        "llama-debug",
        {"rope_scaling": {"factor": 4.0, "original_context": 64}, "head_width": 16},
    ),
    "mistral": ("mistral-debug", {"window": 5}),
    "mistral-scaled": (
        "mistral-debug",
        {"window": 9, "rope_scaling": {"factor": 4.0, "original_context": 64}},
    ),
    "falcon": ("falcon-debug", {}),
    "falcon-grouped": ("falcon-debug", {"block": "parallel-two-norms", "kv_heads": 2}),
    "falcon-one-norm-grouped": ("falcon-debug", {"kv_heads": 2}),
    "falcon-sequential": ("falcon-debug", {"block": "sequential", "kv_heads": 4}),
    "imagegpt": ("imagegpt-debug", {}),
    "imagegpt-classes": ("imagegpt-debug", {"classes": 3}),
}


@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_our_weights_in_their_classes_give_our_logits(name: str, tmp_path: Path) -> None:
    preset, changes = OURS[name]
    shape = {"event_shape": (4, 6)} if preset == "imagegpt-debug" else {"context": LENGTH}
    ours = build(preset, seed=1, layers=2, width=32, mlp_width=48, **shape, **changes).eval()
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    to_transformers(ours, tmp_path, eos=2)

    automatic = "AutoModelForCausalLM"
    if preset == "imagegpt-debug":
        automatic = "ImageGPTForCausalImageModeling"
    theirs = getattr(transformers, automatic).from_pretrained(tmp_path).eval()
    size = ours.config.vocabulary_size
    x = torch.randint(size, (3, *ours.event_shape))
    cond = torch.tensor([2, 0, -1]) if ours.config.classes else None
    bos = read_json(tmp_path / "generation_config.json")["bos_token_id"]
    start = torch.full((3, 1), bos)
    if cond is not None:
        start = torch.where(cond < 0, bos, size + cond).unsqueeze(1)
    inputs = torch.cat([start, x.flatten(1)[:, :-1]], dim=1)
    wanted = ours.conditionals(x, cond).logits
    assert _close(wanted, theirs(inputs).logits[..., :size])

    if cond is None:  # and back again: what was a start vector is a token now, to the same effect
        again = load(tmp_path)
        assert _close(again.conditionals(x.flatten(1)).logits[..., :size], wanted)


def test_what_they_cannot_express_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no window 16"):
        to_transformers(build("llama-debug", window=16), tmp_path)
    with pytest.raises(ValueError, match="no counterpart"):
        to_transformers(build("made-debug"), tmp_path)


def test_their_configs_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(ArtifactError, match="model_type 'bert'"):
        load(tmp_path)
    settings = {"model_type": "falcon", "alibi": True}
    write_json(tmp_path / "config.json", settings)
    with pytest.raises(ArtifactError, match="alibi is True"):
        load(tmp_path)
    rope = {"rope_type": "yarn", "factor": 2.0}
    write_json(tmp_path / "config.json", {**_LLAMA, "model_type": "llama", "rope_scaling": rope})
    with pytest.raises(ArtifactError, match="yarn"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: weights are read"),
        ({"bos_token_id": None, "eos_token_id": None}, "nothing stands before the first element"),
        ({"bos_token_id": 61}, r"bos_token_id is 61, and tokens are 0\.\.60"),
        ({"bos_token_id": None, "eos_token_id": []}, "nothing stands before the first element"),
        ({"bos_token_id": "1"}, "bos_token_id is '1'"),
        ({"vocab_size": None}, "not what transformers writes of llama"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            "not what transformers",
        ),
        ({"rope_parameters": [1]}, "not what transformers writes of llama"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"vocab_size": 60}, "the embedding has 61 rows, vocab_size in config.json is 60"),
        ({"vocab_size": 62}, "the embedding has 61 rows, vocab_size in config.json is 62"),
    ],
)
def test_folders_that_cannot_be_ours_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    _theirs("llama").save_pretrained(tmp_path)
    load(tmp_path)
    path = tmp_path / "config.json"
    write_json(path, {**read_json(path), **changes})
    with pytest.raises(ArtifactError, match=said):
        load(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], None, "llama"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / "config.json", content)
    with pytest.raises(ArtifactError, match="not the settings of a model"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "model_class", "said"),
    [
        ("llama", "LlamaModel", "has no tensor 'lm_head.weight'"),
        ("llama", "LlamaForSequenceClassification", "has no tensor 'lm_head.weight'"),
        ("llama-grouped-tied", "LlamaForSequenceClassification", "'score.weight' .one of 1. is no"),
        ("llama-grouped-tied", "LlamaModel", None),  # what its output layer would be is known
    ],
)
def test_models_of_another_kind_are_refused(
    tmp_path: Path, name: str, model_class: str, said: str | None
) -> None:
    config_class, _, settings = THEIRS[name]
    config = getattr(transformers, config_class)(**settings)
    getattr(transformers, model_class)(config).save_pretrained(tmp_path)
    if said is None:
        load(tmp_path)
        return
    with pytest.raises(ArtifactError, match=said):
        load(tmp_path)


def test_a_mistral_that_says_no_window_has_theirs(tmp_path: Path) -> None:
    _theirs("mistral").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = read_json(path)
    for given, window in (({}, 4096), ({"sliding_window": None}, None)):
        rest = {name: value for name, value in settings.items() if name != "sliding_window"}
        write_json(path, {**rest, **given})
        assert load(tmp_path).config.window == window
        assert transformers.MistralConfig.from_pretrained(tmp_path).sliding_window == window


@torch.no_grad()
def test_a_start_among_the_values_is_written_beside_them(tmp_path: Path) -> None:
    model = build("imagegpt-debug", bos=3).eval()
    to_transformers(model, tmp_path)
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    x = torch.randint(model.config.vocabulary_size, (2, *model.event_shape))
    sequence = model.to_sequence(x)
    inputs = torch.cat([torch.full((2, 1), theirs.config.vocab_size - 1), sequence[:, :-1]], dim=1)
    assert _close(model.conditionals(x).logits, theirs(inputs).logits)
