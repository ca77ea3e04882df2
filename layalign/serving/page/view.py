"""The page itself, by gradio: a question, two answers beside each other, and nothing from another host."""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layalign.serving.page.asking import Answer, Server, stream_answer

if TYPE_CHECKING:
    import fastapi

# In several scripts, one of them written from right to left.
EXAMPLES = (
    "Asha ana matufaha 17. Anawapa marafiki 4 matufaha 2 kila mmoja. Amebaki na matufaha mangapi?",
    "Anna hat 12 Bücher, verkauft 4 und kauft 3. Wie viele Bücher hat sie jetzt?",
    "มาลีมีส้ม 15 ผล ให้น้องไป 6 ผล มาลีเหลือส้มกี่ผล",
    "রিনার কাছে ৯টি কলম আছে। সে আরও ৮টি কিনল। এখন তার কাছে কতটি কলম আছে?",
    "りんごが24個あります。4人で同じ数ずつ分けると、1人何個ですか。",
    "Un tren sale a las 9:40 y llega a las 11:15. ¿Cuántos minutos dura el viaje?",
    "علی کے پاس 20 روپے تھے۔ اس نے 7 روپے خرچ کیے۔ اب اس کے پاس کتنے روپے ہیں؟",
    "A box holds 6 eggs. How many boxes do 42 eggs fill?",
)
# New tokens asked for at first, the most that can be, where models take more, and the hottest temperature.
MOST, LONGEST, HOTTEST = 256, 4096, 2.0
# Seconds between pictures of an answer that grows: faster than one reads, slower than a GPU writes.
FRAME = 0.05
# Each paragraph in the direction of its own script.
CSS = """
textarea { unicode-bidi: plaintext; text-align: start !important; }
.block.note { margin-top: -0.6em; }
.note .html-container { padding: 0 0.9em !important; }
.note [role=status] { min-height: 1.5em; opacity: 0.75; font-variant-numeric: tabular-nums; }
.note [role=alert] { color: #b91c1c; overflow-wrap: anywhere; }
.dark .note [role=alert] { color: #fca5a5; }
"""


@dataclass(frozen=True)
class Side:
    """One of the two answers.

    Args:
        title: above it.
        server: that gives it.
        prompt: of a question, what the server is sent.
    """

    title: str
    server: Server
    prompt: Callable[[str], str]


def build_app(sides: tuple[Side, Side], subject: str) -> fastapi.FastAPI:
    """The page as an ASGI application.

    Args:
        sides: LayAlign's and the LLM's.
        subject: what is served, under the heading.
    """
    import fastapi
    import gradio as gr

    longest = max(2, min(LONGEST, *(side.server.longest - 1 for side in sides)))
    with gr.Blocks(title="LayAlign", analytics_enabled=False) as page:
        gr.HTML(f"<h1>LayAlign</h1><p>{html.escape(subject)}</p>", padding=False)
        question = gr.Textbox(label="Question, in any language", max_lines=12, autofocus=True, elem_id="question")
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", scale=0, min_width=160, elem_id="ask")
            stop = gr.Button("Stop", scale=0, min_width=100, elem_id="stop")
        with gr.Row():
            shown = [_answer(side) for side in sides]
        with gr.Row():
            most = gr.Slider(1, longest, min(MOST, longest), step=1, label="New tokens at most", elem_id="most")
            temperature = gr.Slider(0, HOTTEST, 0, step=0.1, label="Temperature (0: greedy)", elem_id="temperature")
        gr.Examples([[text] for text in EXAMPLES], question, label="Examples", elem_id="examples")
        # One event for both sides: of two the browser would begin the second after the first.
        asked = gr.on(
            [question.submit, ask.click],
            asking(sides),
            [question, most, temperature],
            [part for parts in shown for part in parts],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=asked)
    plain = ["system-ui", "sans-serif"]  # the reader's own fonts
    theme = gr.themes.Default(font=plain, font_mono=["ui-monospace", "monospace"])
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=CSS,
    )


def _answer(side: Side) -> list:
    """The components of an answer: text, and a note below it."""
    import gradio as gr

    with gr.Column(min_width=320):
        text = gr.Textbox(label=side.title, lines=8, max_lines=30, interactive=False, buttons=["copy"])
        note = gr.HTML(noted(Answer()), elem_classes="note")
    return [text, note]


def asking(sides: Sequence[Side]) -> Callable[[str, float, float], AsyncGenerator[tuple[str, ...], None]]:
    """What the page calls with a question, new tokens at most and temperature: text and note of each side, as often as there is more.

    Args:
        sides: that are asked at the same time.
    """

    async def ask(question: str, most: float, temperature: float) -> AsyncGenerator[tuple[str, ...], None]:
        answers, shown = [Answer()] * len(sides), None

        async def follow(place: int) -> None:
            async with aclosing(_answers(sides[place], question, int(most), temperature)) as stream:
                async for answers[place] in stream:
                    pass

        tasks = [asyncio.create_task(follow(place)) for place in range(len(sides))]
        waiting = set(tasks)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=FRAME)
                for task in done:
                    task.result()
                if answers != shown:
                    shown = list(answers)
                    yield tuple(part for answer in answers for part in (answer.text, noted(answer)))
        finally:
            # Nobody looks any more: no server is to go on.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return ask


async def _answers(side: Side, question: str, most: int, temperature: float) -> AsyncGenerator[Answer, None]:
    """A side's, or why it has none."""
    if not question.strip():
        yield Answer(error="Write a question first.")
        return
    try:
        prompt = side.prompt(question)
    except ValueError as error:
        yield Answer(error=str(error))
        return
    async with aclosing(stream_answer(side.server, prompt, most, temperature)) as stream:
        async for answer in stream:
            yield answer


def noted(answer: Answer) -> str:
    """What is said of an answer, as HTML: tokens and their pace, and what went wrong."""
    said = []
    if answer.tokens:
        said.append(f"{answer.tokens} token" + "s" * (answer.tokens != 1))
    if answer.rate is not None:
        said.append(f"{answer.rate:.1f} tokens/s")
    if answer.first is not None:
        said.append(f"first after {answer.first:.2f} s")
    if answer.finish == "length":
        said.append("cut at the most new tokens")
    words = html.escape(" · ".join(said))
    wrong = f'<div role="alert">{html.escape(answer.error)}</div>' if answer.error else ""
    return f'<div role="status">{words}</div>{wrong}'
