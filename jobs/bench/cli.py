"""`vl01 bench`: measures the engine on this machine. Imports nothing heavy before it begins."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Measure the engine, on a GPU for the most part, and how well a checkpoint reads.",
    rich_markup_mode="rich",
    no_args_is_help=True,
)

_SLICE = """Time a slice of the network at full width, with random weights.

No checkpoint is needed: the weights are made on the device, and text runs
to exactly as many tokens as asked for. One slice of 8 layers is a tenth of
the network: its images/s over ten are images/s for each GPU of the whole.
Beside the rates stand what this device can do at best, measured in the
same run, and, on a GPU, which layers the time went to.

[bold]Examples[/bold]
  vl01 bench slice
  vl01 bench slice --workload decode --json decode.json
  vl01 bench slice --requests 64 --prompt 1000 --new 100
  vl01 bench slice --width tiny --device cpu --workload decode"""

_ERROR = """Compare each quantization with the bf16 model that it is made of.

Random weights at full width, one prompt; a layer at a time, so that one GPU
of 80 GB is enough. Random weights have no outliers: a real checkpoint's
int8 inputs may be less exact than these.

[bold]Example[/bold]
  vl01 bench error"""


_QUALITY = """Measure how well a checkpoint reads.

Draws receipts, invoices, letters, forms, tables and texts that are always
the same for a seed and that the small checkpoint was not trained on, asks
for their text, their fields (held to the schema, as vl01 extract does, and
free) and a description, and counts what is wrong: once in fonts of its
training, once in a font it has never seen. Finer than the answers is the
loss of the truth: nats for each token of it, given those before. For any
checkpoint and any setting of the engine; the table is in Markdown.

--compare settings measures int8, chunks of 128 tokens, 4 ranks and the
other device beside what was asked for; --compare faults puts mistakes into
the layers that must show. Each is another measurement of the same length.

[bold]Examples[/bold]
  vl01 bench quality --model CHECKPOINT --pages 8
  vl01 bench quality --model CHECKPOINT --quantization int8 --pp 4
  vl01 bench quality --model CHECKPOINT --pages 12 --compare all
  vl01 bench quality --model CHECKPOINT --answers answers.jsonl"""


_RANKS = """Tell how layers are split over ranks, and how busy each would be.

Needs no GPU and takes seconds: the engine's scheduler fills ranks that take
the time foreseen from the model's sizes and the measured speed of one H100.
Three streams of requests, with answers from 0.3 to 1.7 times as long as
said: photographs (2,400 prompt tokens, 128 of answer), pages (8,080, 256),
and a page for every 19 short prompts (600, 100). What it tells is
simulated, not measured.

[bold]Examples[/bold]
  vl01 bench ranks --pp 4
  vl01 bench ranks --pp 8 --gpu-memory-gib 79 --model CHECKPOINT"""


class WorkloadName(StrEnum):
    ALL = "all"
    COCO = "coco640x480"
    PAGE = "page-a4"
    DECODE = "decode"


class Width(StrEnum):
    RELEASED = "released"
    TINY = "tiny"


class Quantization(StrEnum):
    INT8 = "int8"
    DYNAMIC = "int8-dynamic"


class CheckpointQuantization(StrEnum):
    NONE = "none"
    INT8 = "int8"
    DYNAMIC = "int8-dynamic"


class Compare(StrEnum):
    NOTHING = "nothing"
    SETTINGS = "settings"
    FAULTS = "faults"
    ALL = "all"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def _can_be_written(path: Path | None) -> Path | None:
    """Said before what is written there has taken minutes to measure."""
    if path:
        try:
            path.open("a").close()
        except OSError as error:
            raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from None
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", help="write the numbers here too", dir_okay=False, callback=_can_be_written
    ),
]


@app.callback()
def bench() -> None:
    """Only gathers its commands."""


@app.command("slice", help=_SLICE)
def bench_slice(
    workload: Annotated[
        WorkloadName, typer.Option(help="coco640x480: 128 x 2400 + 128 tokens; page-a4: 32 x 8080 "
        "+ 256; decode: 128 x 64 + 256")
    ] = WorkloadName.ALL,
    requests: Annotated[int | None, typer.Option(min=1, help="another number of requests")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, help="another length of prompts")] = None,
    new: Annotated[int | None, typer.Option(min=1, help="another length of answers")] = None,
    layers: Annotated[int, typer.Option(min=1, help="layers; every 8th is softmax")] = 8,
    width: Annotated[Width, typer.Option(help="tiny: to try it anywhere")] = Width.RELEASED,
    quantization: Annotated[
        Quantization, typer.Option(help="int8-dynamic: the inputs of products in int8 too")
    ] = Quantization.INT8,
    repeat: Annotated[int, typer.Option(min=1, help="runs, of which the best counts")] = 3,
    chunk_tokens: Annotated[int, typer.Option(min=128, help="most tokens at a time")] = 16384,
    device: Annotated[Device, typer.Option()] = Device.AUTO,
    plain: Annotated[bool, typer.Option("--plain", help="without the kernels")] = False,
    no_profile: Annotated[
        bool, typer.Option("--no-profile", help="without the time of each layer")
    ] = False,
    json_file: JsonFile = None,
) -> None:  # fmt: skip
    from dataclasses import replace

    from jobs.bench import report
    from jobs.bench.slice import SliceSettings, open_slice
    from jobs.bench.workloads import WORKLOADS

    chosen = list(WORKLOADS.values()) if workload == "all" else [WORKLOADS[workload]]
    other = {"requests": requests, "prompt": prompt, "new": new}
    if changes := {name: value for name, value in other.items() if value}:
        chosen = [replace(chosen[-1], name="yours", what="requests", **changes)]
    settings = SliceSettings(
        layers, str(width), str(device), str(quantization), chunk_tokens, repeat, plain,
        profile=not no_profile,
    )  # fmt: skip
    measured = []
    with open_slice(settings) as opened:
        report.show_device(opened.device, opened.ceilings)
        for each in chosen:
            measured.append(opened.measure(each))
            report.show(measured[-1], opened.ceilings)
            if json_file:
                numbers = report.as_json(settings, opened.device, opened.ceilings, measured)
                json_file.write_text(json.dumps(numbers, indent=2))


@app.command("ranks", help=_RANKS)
def bench_ranks(
    pp: Annotated[int, typer.Option("--pp", min=1, help="ranks the layers are spread over")] = 4,
    gpu_memory_gib: Annotated[
        float, typer.Option(help="what a GPU has; an H200 139, an H100 79", min=0)
    ] = 139.0,
    model: Annotated[
        Path | None,
        typer.Option(help="folder of a checkpoint; else the released sizes", file_okay=False),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=128, help="most tokens at a time; default: as in a run")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    from jobs.bench import ranks
    from jobs.bench.slice import released_model
    from model.config import load_config
    from model.engine.config import EngineConfig, usual_chunk_tokens

    config = load_config(model) if model else released_model()
    chunk_tokens = chunk_tokens or usual_chunk_tokens(on_gpu=True, ranks=pp)
    engine = EngineConfig("", ranks=pp, device="cuda", chunk_tokens=chunk_tokens)
    foreseen = ranks.foresee(config, engine, int(gpu_memory_gib * 1024**3))
    ranks.show(foreseen)
    if json_file:
        json_file.write_text(json.dumps(foreseen.as_json(), indent=2))


@app.command("error", help=_ERROR)
def bench_error(
    layers: Annotated[int, typer.Option(min=1, help="layers; every 8th is softmax")] = 8,
    width: Annotated[Width, typer.Option(help="tiny: to try it anywhere")] = Width.RELEASED,
    device: Annotated[Device, typer.Option()] = Device.AUTO,
    tokens: Annotated[int, typer.Option(min=2, help="tokens of the prompt")] = 8192,
) -> None:
    from jobs.bench import report
    from jobs.bench.error import measure_errors

    report.show_errors(measure_errors(layers, str(width), str(device), tokens))


@app.command("quality", help=_QUALITY)
def bench_quality(
    model: Annotated[Path, typer.Option(help="folder of the checkpoint", file_okay=False)],
    pages: Annotated[int, typer.Option(min=1, help="pages in each set of fonts")] = 24,
    seed: Annotated[int, typer.Option(help="another seed, other pages")] = 0,
    quantization: Annotated[CheckpointQuantization, typer.Option()] = CheckpointQuantization.NONE,
    pp: Annotated[int, typer.Option("--pp", min=1, help="ranks the layers are spread over")] = 1,
    chunk_tokens: Annotated[int, typer.Option(min=128, help="most tokens at a time")] = 16384,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 1024,
    device: Annotated[Device, typer.Option()] = Device.AUTO,
    compare: Annotated[Compare, typer.Option(help="measure these too")] = Compare.NOTHING,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="write every answer beside its truth", dir_okay=False, callback=_can_be_written
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    from jobs.bench import quality
    from model.engine.config import EngineConfig

    config = EngineConfig(
        str(model),
        ranks=pp,
        device=device.value,
        quantization=quantization.value,
        chunk_tokens=chunk_tokens,
    )
    asked = quality.Asked(pages, seed, max_new_tokens)
    measured = []
    for each in quality.measure(quality.settings(config, compare.value), asked):
        measured.append(each)
        print(f"measured: {each.setting.name}, {each.fonts}", file=sys.stderr)
    quality.show(measured)
    if answers:
        quality.write_answers(measured, answers)
    if json_file:
        json_file.write_text(json.dumps(quality.as_json(measured, asked), indent=2))


if __name__ == "__main__":
    app()
