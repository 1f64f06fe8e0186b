"""What comes with philens, at work: a language model on texts, and a small one on formal languages."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from philens.findings.reproduce import measure, write
from philens.findings.reproduce_texts import reproduce_texts
from philens.findings.tasks import measure_tasks
from philens.scoring.documents import TokenTable
from philens.show.page import PageDocument, write_page
from philens.support.versions import versions
from philens.tasks.automata import TASKS
from philens.training.opening import SHIPPED, load_run

EXPLANATIONS = {
    "memorized_sequences": "Strings known by heart: the model recites.",
    "memorized_programs": "New strings of automata known by heart: the model runs a program it holds.",
    "new_vocabulary": "Automata known by heart, their letters renamed: only the renaming must be found out.",
    "in_context_language": "A new automaton: the model must work out the program from the text itself.",
    "random": "Random letters: much surprise and nothing to find out.",
    "copy": "Random strings, each said twice: the known false positive, copying raises phi.",
}


MODEL = "smollm2"
# Texts of each level and tokens of each text: what a CPU reads in some ten seconds.
TEXTS, TOKENS = 6, 128


def demo_texts(output: Path) -> dict[str, Any]:
    """Measure SmolLM2 on the five levels of text that philens has; write `output/texts`."""
    return reproduce_texts(MODEL, None, output, documents=TEXTS, tokens=TOKENS)


def demo_tasks(output: Path, documents: int = 32) -> dict[str, Any]:
    """Measure the formal-language model on every task; write results, figure and page into `output/tasks`."""
    lens, recipe = load_run(SHIPPED)
    table = measure(lens, recipe, documents=documents)
    results = measure_tasks(table, seed=recipe.seed)
    run = {
        "finding": "tasks",
        "scale": "small",
        "seed": recipe.seed,
        "versions": versions(),
        "recipe": asdict(recipe),
    }
    write("tasks", output / "tasks", results, run)
    write_page(output / "tasks" / "page.html", "Where a small model thinks", page_documents(table))
    return run | results


def page_documents(table: TokenTable) -> list[PageDocument]:
    """The first document of each task in a table."""
    documents = []
    for number, name in enumerate(TASKS):
        index = int((table.docs.task == number).argmax())
        rows = slice(int(table.docs.offsets[index]), int(table.docs.offsets[index + 1]))
        documents.append(
            PageDocument(
                name.replace("_", " "),
                EXPLANATIONS[name],
                list(table.docs.text(index)),
                {"phi": table.phi[rows], "surprisal": table.surprisal[rows]},
            )
        )
    return documents
