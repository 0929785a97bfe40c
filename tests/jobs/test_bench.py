"""`vl01 bench`, whole, on a CPU with a tiny slice; and the arithmetic behind its shares."""

import json

import pytest
import torch

from jobs import cli
from jobs.bench.error import measure_errors
from jobs.bench.families import IDLE, family, gather
from jobs.bench.workloads import WORKLOADS, Workload, flops, flops_per_token, step_bytes
from model.config import load_config
from model.decoder import Decoder
from model.nano.random_checkpoint import RELEASED_SIZES, write_configuration
from model.weights.names import checkpoint_tensors
from model.weights.random import random_decoder
from schemas.errors import ExitCode


def test_the_command_measures_exactly_what_was_asked_for(tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    asked = "bench slice --width tiny --device cpu --workload decode --repeat 2 --chunk-tokens 256"
    asked += f" --requests 3 --prompt 70 --new 4 --json {numbers}"
    with pytest.raises(SystemExit) as ended:
        cli.main(asked.split())
    assert not ended.value.code
    assert "requests/s" in capsys.readouterr().out
    (measured,) = json.loads(numbers.read_text())["workloads"]
    assert measured["workload"]["requests"] == 3
    assert measured["seconds"] == min(measured["runs"])
    assert len(measured["runs"]) == 2
    assert measured["output_tokens_per_second"] == pytest.approx(3 * 4 / measured["seconds"])
    # One pass for the prompts, one for each further token: nothing ended early, nothing late.
    assert measured["microbatches"] == 4


@pytest.mark.parametrize("command", ["ranks", "slice", "quality --model nowhere"])
def test_numbers_that_cannot_be_written_are_not_measured_first(command, tmp_path, capsys):
    where = tmp_path / "nowhere" / "numbers.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *command.split(), "--json", str(where)])
    assert ended.value.code == ExitCode.USAGE
    assert f"cannot write {where}: No such file or directory" in capsys.readouterr().err


def test_int8_inputs_are_told_from_int8_weights_by_their_error(capsys):
    torch.manual_seed(0)
    weights, inputs = measure_errors(layers=3, width="tiny", device="cpu", tokens=70)
    assert (weights.mode, inputs.mode) == ("int8", "int8-dynamic")
    assert len(weights.layers) == len(inputs.layers) == 3
    assert 0 < max(weights.layers) < 0.1
    assert max(inputs.layers) < 0.15
    assert sum(weights.layers) < sum(inputs.layers)
    assert 0 < weights.logits < inputs.logits
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "bench",
                "error",
                "--width",
                "tiny",
                "--device",
                "cpu",
                "--layers",
                "2",
                "--tokens",
                "70",
            ]
        )
    assert not ended.value.code
    assert "int8-dynamic" in capsys.readouterr().out


def test_a_slice_that_does_not_exist_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "slice", "--workload", "coco"])
    assert ended.value.code == 2
    assert "coco640x480" in capsys.readouterr().err


def test_the_full_width_is_refused_where_it_would_take_all_memory(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "slice", "--device", "cpu"])
    assert ended.value.code == 2
    assert "--width tiny" in capsys.readouterr().err


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    write_configuration(folder, RELEASED_SIZES, endless=True)
    return load_config(folder)


def test_the_released_sizes_are_the_released_models(released):
    tensors = checkpoint_tensors(released)
    assert len(tensors) == 8637
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
    assert parameters == pytest.approx(456.1e9, rel=1e-3)
    assert released.eos_token_ids == ()


def test_flops_and_bytes_are_those_of_the_weights(released):
    def weights(active_experts: int) -> int:
        """In the layers' matrices, with so many experts each."""
        return sum(
            torch.Size(tensor.shape).numel()
            for tensor in checkpoint_tensors(released)
            if ".layers." in tensor.name and tensor.name.startswith("language_model")
            if len(tensor.shape) == 2 and (tensor.expert or 0) < active_experts
        )

    text = released.text
    assert flops_per_token(text) == pytest.approx(2 * weights(active_experts=2), rel=1e-9)
    head = text.vocab_size * text.hidden_size
    (one,) = {flops(text, Workload("one", requests=1, prompt=1, new=1))}
    assert one == flops_per_token(text) + 2 * head
    gates = text.num_layers * text.num_experts * text.hidden_size
    states = 70 * 64 * 128 * 128 * 4 * 2
    cache = 10 * 4096 * 1000
    expected = weights(32) - gates + 2 * head + 128 * (states + cache)
    assert step_bytes(text, 128, 1000, weight_bytes=1) == pytest.approx(expected, rel=1e-9)


def test_prompts_hold_text_alone_and_are_the_same_every_time(released):
    first, second = (WORKLOADS["page-a4"].make_requests(released) for _ in range(2))
    assert len(first) == 32
    for request, again in zip(first, second, strict=True):
        assert len(request.token_ids) == 8080
        assert (request.token_ids == again.token_ids).all()
        assert (request.token_ids != released.image_token_id).all()
        assert request.token_ids.min() >= 0
        assert request.token_ids.max() < released.text.vocab_size


def test_random_weights_leave_no_number_unset_and_activations_near_one(tmp_path, monkeypatch):
    # What a Decoder allocates is made NaN first, or the number that int8 never takes.
    def poisoned(self, *arguments, **settings):
        allocate(self, *arguments, **settings)
        for parameter in self.parameters():
            parameter.fill_(-128 if parameter.dtype == torch.int8 else float("nan"))

    allocate = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", poisoned)
    sizes = {"hidden_size": 128, "vocab_size": 640, "layers": 8}
    write_configuration(tmp_path, type(RELEASED_SIZES)(**sizes))
    config = load_config(tmp_path)
    decoder = random_decoder(config, range(8), dtype=torch.float32, device="cpu")
    for name, parameter in decoder.named_parameters():
        unset = parameter == -128 if parameter.dtype == torch.int8 else parameter.isnan()
        assert not unset.any(), name
    logits = decoder.logits(torch.randn(20, 128))
    assert 0.5 < logits[:, :100].std() < 2


def test_every_microsecond_of_a_profile_belongs_to_one_family():
    kernels = [
        ("_gate_up", 10.0, 20.0),
        ("_lightning_chunks", 20.0, 25.0),
        ("_softmax_chunks", 26.0, 30.0),
        ("Memcpy HtoD", 29.0, 30.0),
        ("void (anonymous namespace)::softmax_warp_forward<float>", 40.0, 41.0),
        ("void cunn_SoftMaxForward<4, float>", 41.0, 43.0),
    ]
    seconds, longest = gather(kernels)
    assert seconds["MoE"] == pytest.approx(11e-6)
    assert seconds["lightning"] == pytest.approx(5e-6)
    assert seconds["softmax"] == pytest.approx(4e-6)
    assert seconds["sampling"] == pytest.approx(2e-6)
    assert seconds[IDLE] == pytest.approx(11e-6)
    assert "_gate_up" in longest[0]
    assert family("_linear") == "projections"
