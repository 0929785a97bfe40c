"""The whole plan of a run on one screen: check, list, sample, and reckon what it will take."""

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from math import inf
from pathlib import Path

import pyarrow as pa

from model.inputs.images import DecodeLimits
from pipeline.estimate.gpus import engine_config, mean_tokens, memory_estimate, rank_estimates
from pipeline.estimate.headers import HeaderReader
from pipeline.estimate.sample import Survey, survey
from pipeline.estimate.spread import spread
from pipeline.estimate.throughput import find_throughput, time_estimate
from pipeline.ledger import Ledger
from pipeline.model import Model, model_revision, open_model
from pipeline.plan import Plan, units_of
from pipeline.plan_file import PLAN_FILE, read_plan
from pipeline.read import quickly, read_settings
from pipeline.sources import Source, open_source
from schemas.errors import Reason
from schemas.estimate import Assumptions, Estimate, MemoryEstimate, RowsEstimate
from schemas.job import Job
from schemas.ledger import Unit, UnitKind
from schemas.report import Foretold

_GIB = 1024**3
# Before a run, whose GPUs may be paid for: not for long, however slow storage is.
_LOOK_SECONDS = 20.0


def estimate(job: Job, assumptions: Assumptions) -> Estimate:
    """What a run of this job would do now. Writes nothing, and starts nothing on GPUs.

    Raises ConfigError for all that would stop that run later, as far as this machine can tell.
    """
    model = open_model(job)
    source = open_source(job.source, job.endpoint_url)
    ledger = Ledger(job.output, job.endpoint_url)
    ledger.check()
    if job.address != "local":
        _check_cluster(job)
    if not ledger.resume(job.fingerprint(model_revision(job))):
        plan = Plan.of(job, source)
        told = foretell(job, model, source, _planned(plan), None, assumptions)
        return replace(told, output=ledger.output, unread=dict(plan.unread))
    if not job.grow:
        return foretell(job, model, source, _pending(ledger), ledger, assumptions)
    with tempfile.TemporaryDirectory() as folder:
        growth = ledger.find_growth(job, source, Path(folder))
        units = chain(_pending(ledger), _grown(ledger, Path(folder)))
        told = foretell(job, model, source, units, ledger, assumptions)
    return replace(told, growth=growth, units_done=growth.totals.units - told.units)


def foretold(job: Job, model: Model, source: Source, ledger: Ledger, pending: pa.Table) -> Foretold:
    """The plan of a run that is about to begin, for its report."""
    units = units_of(pending)
    told = foretell(job, model, source, units, ledger, Assumptions(), _LOOK_SECONDS)
    return Foretold(
        rows=sum(kind.rows for kind in told.rows.values()),
        failed=sum(told.reasons.values()),
        tiles=told.tiles.total,
        prompt_tokens=told.prompt_tokens.total,
        exact=told.exact,
        seconds=told.time and told.time.seconds,
        gpu_hours=told.time and told.time.gpu_hours,
        speed=told.throughput and told.throughput.origin,
        rank_busy=ranks_busy(job, model),
        pages=any(kind.pages for kind in told.rows.values()),
    )


def ranks_busy(job: Job, model: Model) -> tuple[float, ...]:
    """The most that each rank can be busy; empty on CPU."""
    ranks = rank_estimates(model.config, engine_config(job))
    return tuple(rank.busy for rank in ranks if rank.busy is not None)


def foretell(
    job: Job,
    model: Model,
    source: Source,
    units: Iterable[Unit],
    ledger: Ledger | None,
    assumptions: Assumptions,
    look_seconds: float = inf,
) -> Estimate:
    """What doing these units will take. ledger: of the output, when it holds this job's rows.
    look_seconds: for how long to look at what is in them."""
    kinds = survey(units, _header_reader(job, source, model), look_seconds)
    tiles, prompts, reasons = _reckon(model, kinds)
    usable = sum(weight for _, weight in prompts)
    tokens = spread(prompts)
    prompt = tokens.total / usable if usable else 0.0
    throughput = find_throughput(job, model.config.text, ledger, assumptions, prompt)
    return Estimate(
        source=source.address,
        output=ledger.output if ledger else job.output,
        units=sum(kind.units for kind in kinds.values()),
        units_done=int(ledger.committed().sum()) - len(ledger.outdated()) if ledger else 0,
        rows={name.value: _rows(kind) for name, kind in kinds.items()},
        exact=all(kind.whole for kind in kinds.values()),
        reasons={reason: round(count) for reason, count in reasons.items()},
        tiles=spread(tiles),
        prompt_tokens=tokens,
        ranks=rank_estimates(model.config, engine_config(job)),
        memory=_memory(job, model, prompt, assumptions),
        throughput=throughput,
        time=throughput
        and time_estimate(throughput, tokens.total, usable, assumptions.gpu_hour_price),
        assumptions=assumptions,
    )


def _check_cluster(job: Job) -> None:
    """Raises ConfigError when no cluster answers at the address, or it has too few GPUs."""
    from pipeline.placement import place, ray_session  # Ray takes seconds to import

    with ray_session(job.address):
        place(job)


def _planned(plan: Plan) -> Iterator[Unit]:
    """The units of a first run. Raises ConfigError: nothing usable, columns that cannot be kept."""
    yield from plan.units()
    plan.kept()


def _pending(ledger: Ledger) -> Iterator[Unit]:
    """The units that earlier runs on this output have left."""
    for units in ledger.pending():
        yield from units_of(units)


def _grown(ledger: Ledger, folder: Path) -> Iterator[Unit]:
    """What a growth in a folder adds to the pending units: of those it changes nothing."""
    done, outdated = ledger.committed(), ledger.outdated()
    with (folder / PLAN_FILE).open("rb") as file:
        for table in read_plan(file):
            for unit in units_of(table):
                number = unit.number
                if number >= len(done) or (done[number] and number not in outdated):
                    yield unit


def _header_reader(job: Job, source: Source, model: Model) -> HeaderReader:
    vision = model.config.vision
    return HeaderReader(
        read=quickly(read_settings(job, source, model.page_settings(job))),
        limits=DecodeLimits(job.max_pixels, job.max_bytes, job.decode_seconds),
        exif_rotate=job.exif_rotate,
        pinpoints=model.config.pinpoints,
        tile=vision.image_size,
        patch=vision.patch_size,
    )


_Weighted = list[tuple[int, float]]  # a count of a row, and how many rows it stands for


def _reckon(
    model: Model, kinds: Mapping[UnitKind, Survey]
) -> tuple[_Weighted, _Weighted, dict[str, float]]:
    """Tiles and prompt tokens of the rows that will be answered, reasons of those that fail."""
    words = len(model.template.prefix_ids) + len(model.template.suffix_ids)
    tiles, prompts = [], []
    reasons: defaultdict[str, float] = defaultdict(float)
    for what, weight in (seen for kind in kinds.values() for seen in kind.seen):
        if isinstance(what, Reason):
            reasons[what.value] += weight
        else:
            tiles.append((what.tiles, weight))
            prompts.append((words + what.tokens, weight))
    return tiles, prompts, reasons


def _rows(kind: Survey) -> RowsEstimate:
    return RowsEstimate(
        units=kind.units,
        rows=round(kind.rows),
        rows_known=kind.rows_known,
        headers=len(kind.seen),
        failed=round(sum(weight for what, weight in kind.seen if isinstance(what, Reason))),
        pages=kind.pages,
    )


def _memory(
    job: Job, model: Model, prompt: float, assumptions: Assumptions
) -> MemoryEstimate | None:
    """None on CPU. Raises ConfigError when the GPUs asked for are too small."""
    engine = replace(engine_config(job), tokens_per_sequence=mean_tokens(prompt, job))
    if not engine.on_cuda:
        return None
    return memory_estimate(model.config, engine, int(assumptions.gpu_memory_gib * _GIB))
