"""`layalign analyze`: measure a saved model on parallel texts and write figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layalign.analysis import measures, plots
from layalign.analysis.states import joined_states, llm_states
from layalign.analysis.texts import parallel_texts
from layalign.evaluation import report
from layalign.evaluation.output import check_output
from layalign.evaluation.settings import DEFAULT_SETTINGS, GenerationSettings
from layalign.generation.texts import Answerer
from layalign.kernels.files import write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layalign.model import LayAlignForConditionalGeneration
    from layalign.processor import LayAlignProcessor

RESULTS = "analysis.json"

# {lang: N texts}, row i of one meaning in all of them, English among them.
Parallel = Mapping[str, Sequence[str]]


def analyze(
    model_path: str | PathLike,
    task: str = "mgsm",
    *,
    data: str | PathLike | None = None,
    texts: str | PathLike | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = 100,
    output: str | PathLike | None = None,
    settings: GenerationSettings = DEFAULT_SETTINGS,
    progress: bool = True,
    bases: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure how alike the model sees the same text in different languages, and write a folder: analysis.json and a
    figure for each of the paper's analyses (section 5.4, appendix A).

    Args:
        model_path: folder or hub name.
        task, data: parallel questions, as in `tasks.load_task`.
        texts: a folder with one UTF-8 file a language instead, such as sw.txt, whose lines are translations of each
            other (FLORES).
        languages: codes, English among them; None for all.
        limit: texts a language, from the start; None for all.
        output: the folder; runs/analyze/<model's name> by default.
        settings: how the model is run; all but `max_new_tokens`.
        progress: show bars, then the tables.
        bases: {"encoder", "llm"} of the model, where they are not where it says.

    Returns:
        What analysis.json holds: texts (N), languages, english {"encoder", "llm", "llm_alone": {lang: {"same", "other",
        "found"}}} (see `measures.against_english`; the encoder's last state), encoder_layers {"english": {lang: {...: [a
        number a state]}}, "similarity": (E, E)}, components {"llm", "llm_alone": {"share": (2,), "points": {lang: (N, 2)}}},
        and where there is an aligner ratio {lang: [a number a fused layer]}, fused_layers, mix {"keys", "values": (L, E)},
        mixed_states and gates (None if dynamic).

    Raises:
        ValueError: anything missing or malformed.
    """
    from layalign.loading import check_model_path, load_model

    check_model_path(model_path)
    folder = Path(output) if output else Path("runs") / "analyze" / Path(model_path).name
    check_output(folder, "analysis", RESULTS)
    parallel = parallel_texts(task, data, texts, languages, limit)
    model, processor = load_model(model_path, settings.dtype, settings.device, settings.devices, **(bases or {}))
    reading: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "encoder_max_length": settings.encoder_max_length,
        "prompt": settings.prompt,
    }
    answerer = Answerer(model, processor, **reading)
    for lang, rows in parallel.items():
        answerer.check(rows, partial(_named, lang), [lang] * len(rows))
    results = measured(model, processor, parallel, progress=progress, **reading)
    alone = measured_alone(model.llm, processor.tokenizer, parallel, progress=progress, batch_size=settings.batch_size)
    for name, found in alone.items():
        results[name]["llm_alone"] = found["llm"]
    _write(results, folder, Path(model_path).name, progress)
    return results


def _named(lang: str, place: int) -> str:
    return f"{lang}, text {place + 1}"


def measured(
    model: LayAlignForConditionalGeneration,
    processor: LayAlignProcessor,
    parallel: Parallel,
    *,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The measures of `analyze` of a model, without those of the LLM alone; settings: of `joined_states`."""
    states = {
        lang: joined_states(model, processor, rows, lang=lang, progress=lang if progress else None, **settings)
        for lang, rows in parallel.items()
    }
    encoder = {lang: found.encoder for lang, found in states.items()}
    llm = {lang: found.llm for lang, found in states.items()}
    last = {lang: rows[-1] for lang, rows in encoder.items()}
    results = {
        "texts": len(llm["en"]),
        "languages": list(states),
        "english": {"encoder": measures.against_english(last), "llm": measures.against_english(llm)},
        "encoder_layers": {
            "english": measures.by_layer(encoder),
            "similarity": measures.layer_similarity(encoder).tolist(),
        },
        "components": {"llm": measures.components(llm)},
    }
    if model.aligner is None:
        return results
    mix = model.aligner.mix.weight.detach().float().cpu()
    return results | {
        "ratio": {lang: found.ratio.mean(1).tolist() for lang, found in states.items() if found.ratio is not None},
        "fused_layers": list(model.config.fused_layers),
        "mix": {"keys": mix[0::2].tolist(), "values": mix[1::2].tolist()},
        "mixed_states": ["mean"] if model.aligner.average else list(model.config.mixed_states),
        "gates": None if model.config.gate == "dynamic" else model.gates().tolist(),
    }


def measured_alone(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parallel: Parallel,
    *,
    progress: bool = False,
    **settings: Any,
) -> dict[str, dict[str, Any]]:
    """{"english", "components"} of a causal LLM that reads the texts itself, under the name "llm"; settings: of `llm_states`."""
    states = {
        lang: llm_states(llm, tokenizer, rows, progress=f"{lang}, LLM alone" if progress else None, **settings)
        for lang, rows in parallel.items()
    }
    return {"english": {"llm": measures.against_english(states)}, "components": {"llm": measures.components(states)}}


def english_tables(readers: Mapping[str, Mapping[str, measures.Nearness]]) -> dict[str, report.Table]:
    """{title: table} for `evaluation.report` from {reader: what `measures.against_english` gives}."""
    kinds = {
        "Cosine with English of the same meaning (x 100)": ("same", 100),
        "Cosine with English of other meanings (x 100)": ("other", 100),
        "English of the same meaning is the nearest (%)": ("found", 1),
    }
    return {
        title: {
            reader: {lang: scale * values[kind] for lang, values in found.items()} for reader, found in readers.items()
        }
        for title, (kind, scale) in kinds.items()
    }


def _write(results: dict[str, Any], output: Path, name: str, show: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    titles = {"llm": f"{name}, LLM's last layer", "llm_alone": "LLM alone, last layer"}
    english = {title: results["english"][key] for key, title in titles.items()}
    plots.plot_english(english, output / "english.png")
    plots.plot_components(
        {title: results["components"][key] for key, title in titles.items()}, output / "components.png"
    )
    plots.plot_encoder_layers(results["encoder_layers"], output / "encoder_layers.png")
    if "mix" in results:
        plots.plot_ratio(results["ratio"], results["fused_layers"], output / "ratio.png")
        plots.plot_mix(results["mix"], results["mixed_states"], results["fused_layers"], output / "aligner.png")
        if results["gates"] is not None:
            report.plot_gates({name: results["gates"]}, output / "gates.png")
    tables = english_tables({"encoder, last state": results["english"]["encoder"]} | english)
    write_text(output / "table.md", "\n".join(report.markdown_table(table, title) for title, table in tables.items()))
    write_json(output / RESULTS, results)
    if show:
        for title, table in tables.items():
            report.print_table(table, title)
        print(f"figures in {output}")
