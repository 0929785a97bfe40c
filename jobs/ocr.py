"""The ocr task: what is asked of a page when its text is wanted."""

from jobs import ladder
from jobs.task import Task

TASK = Task(
    name="ocr",
    summary="Write down the text of every page, as Markdown.",
    defaults={
        "prompt": (
            "Write down all text on this page as Markdown, in the order in which a person would "
            "read it. Keep the wording, the language, the spelling and the numbers exactly as "
            "they are printed. Mark headings with #, write lists as Markdown lists, tables as "
            "Markdown tables and formulas as LaTeX between dollar signs. Leave out pictures and "
            "decoration. Add nothing of your own: no comment, no summary, no code fence. If there "
            "is no text on the page, answer with nothing."
        ),
        "max_new_tokens": 4096,  # a dense page of print is 1,500 to 3,000 tokens
        "stop_repetition": True,
        "ladder": ladder.PAGE,
        "skip_blank": True,
    },
    examples=(
        "scans --output texts --model /models/vl01 --pp 8",
        "'letters/18*/*.png' --output letters --model /models/vl01",
        "pages.parquet --output texts --model /models/vl01 --keep book",
        "s3://bucket/scans --output s3://bucket/texts \\\n"
        "      --model /models/vl01 --pp 4 --replicas 2",
    ),
)
