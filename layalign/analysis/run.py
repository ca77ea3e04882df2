"""`layalign analyze`: measure a saved model on parallel texts and write figures."""

import json
from pathlib import Path

from layalign.analysis import measures, plots
from layalign.analysis.states import joined_states, llm_states
from layalign.analysis.texts import parallel_texts
from layalign.evaluation import report
from layalign.generation.texts import Answerer
from layalign.kernels.files import write_text

RESULTS = "analysis.json"


def analyze(
    model_path,
    task="mgsm",
    *,
    data=None,
    texts=None,
    languages=None,
    limit=100,
    batch_size=16,
    encoder_max_length=None,
    output=None,
    dtype=None,
    device=None,
    progress=True,
):
    """Measure how alike the model sees the same text in different languages, and write `output` (default:
    runs/analyze/<model's name>): analysis.json and a figure for each of the paper's analyses (section 5.4, appendix A).

    model_path: folder or hub name. task, data, languages: parallel questions, as in `evaluation.tasks.load_task`; texts: a
        folder with one UTF-8 file a language instead, such as sw.txt, whose lines are translations of each other (FLORES).
        English must be among them.
    limit: texts a language, from the start; None for all. batch_size: changes the speed alone.
    encoder_max_length, dtype, device: as in `Answerer` and `loading.load_model`.

    Returns what analysis.json holds: texts (N), languages, english {"encoder", "llm", "llm_alone": {lang: {"same", "other",
    "found"}}} (see `measures.against_english`; the encoder's last state), encoder_layers {"english": {lang: {...: [a number a
    state]}}, "similarity": (E, E)}, components {"llm", "llm_alone": {"share": (2,), "points": {lang: (N, 2)}}}, and where there
    is an aligner ratio {lang: [a number a fused layer]}, fused_layers, mix {"keys", "values": (L, E)}, mixed_states and gates
    (None if dynamic).

    Raises ValueError for anything missing or malformed.
    """
    from layalign.loading import check_model_path, load_model

    check_model_path(model_path)
    output = Path(output) if output else Path("runs") / "analyze" / Path(model_path).name
    _check_output(output)
    parallel = parallel_texts(task, data, texts, languages, limit)
    model, processor = load_model(model_path, dtype, device)
    answerer = Answerer(model, processor, batch_size=batch_size, encoder_max_length=encoder_max_length)
    for lang, rows in parallel.items():
        answerer.check(rows, lambda place, lang=lang: f"{lang}, text {place + 1}")
    settings = {"batch_size": batch_size, "progress": progress}
    results = measured(model, processor, parallel, encoder_max_length=encoder_max_length, **settings)
    for name, found in measured_alone(model.llm, processor.tokenizer, parallel, **settings).items():
        results[name]["llm_alone"] = found["llm"]
    _write(results, output, Path(model_path).name, progress)
    return results


def measured(model, processor, parallel, *, progress=False, **settings):
    """The measures of `analyze` of a model on {lang: parallel texts}, those of the LLM alone apart; settings: of `joined_states`."""
    states = {
        lang: joined_states(model, processor, rows, progress=lang if progress else None, **settings)
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
        "ratio": {lang: found.ratio.mean(1).tolist() for lang, found in states.items()},
        "fused_layers": list(model.config.fused_layers),
        "mix": {"keys": mix[0::2].tolist(), "values": mix[1::2].tolist()},
        "mixed_states": ["mean"] if model.aligner.average else list(model.config.mixed_states),
        "gates": None if model.config.gate == "dynamic" else model.gates().tolist(),
    }


def measured_alone(llm, tokenizer, parallel, *, progress=False, **settings):
    """{"english", "components"} of a causal LLM that reads the texts itself, under the name "llm"; settings: of `llm_states`."""
    states = {
        lang: llm_states(llm, tokenizer, rows, progress=f"{lang}, LLM alone" if progress else None, **settings)
        for lang, rows in parallel.items()
    }
    return {"english": {"llm": measures.against_english(states)}, "components": {"llm": measures.components(states)}}


def _check_output(output):
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file, takes a folder")
    if output.exists() and any(output.iterdir()) and not (output / RESULTS).exists():
        raise ValueError(f"output: {output} is not empty and holds no analysis; choose another folder")


def english_tables(readers):
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


def _write(results, output, name, show):
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
    write_text(output / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    if show:
        for title, table in tables.items():
            report.print_table(table, title)
        print(f"figures in {output}")
