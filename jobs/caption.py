"""The caption task: what is asked of an image when the user does not say it in his own words."""

from jobs.task import Task

TASK = Task(
    name="caption",
    summary="Write a caption for every image.",
    defaults={
        "prompt": (
            "Describe this image in one paragraph: what it shows, where things are, "
            "and any text that can be read in it."
        ),
    },
    examples=(
        "photos --output captions --model /models/vl01 --pp 8",
        "'photos/2024/*.jpg' --output captions --model /models/vl01",
        "cats.parquet --output cats --model /models/vl01 --keep url \\\n"
        "      --prompt 'Which breed is this cat?'",
        "links.csv --uri-column link --keep id --output linked \\\n      --model /models/vl01",
        "s3://bucket/shards --output s3://bucket/captions \\\n"
        "      --model /models/vl01 --pp 4 --replicas 2",
    ),
)
