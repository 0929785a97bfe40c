"""The manifests in jobs/deploy are what Kubernetes and KubeRay take, and agree with each other."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from jobs.config import job_from_file
from schemas.job import Job

DEPLOY = Path(__file__).parents[2] / "jobs/deploy"
KUBERNETES = "1.34"

_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}


def _fields(required: list[str], **fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
    }


# The fields used here, as KubeRay's API types of v1.5.1 and later declare them (ray.io/v1:
# RayJobSpec, RayClusterSpec, AuthOptions, HeadGroupSpec, WorkerGroupSpec). Pod templates are judged
# by Kubernetes' own schemas.
RAY_JOB = _fields(
    ["entrypoint", "rayClusterSpec"],
    entrypoint={"type": "string"},
    backoffLimit=_COUNT,
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=_COUNT,
    rayClusterSpec=_fields(
        ["headGroupSpec", "rayVersion"],
        rayVersion={"type": "string"},
        authOptions=_fields(["mode"], mode={"enum": ["disabled", "token"]}, secretName=_NAME),
        headGroupSpec=_fields(["template"], rayStartParams=_STRINGS, template={"type": "object"}),
        workerGroupSpecs={
            "type": "array",
            "items": _fields(
                ["groupName", "template"],
                groupName=_NAME,
                replicas=_COUNT,
                minReplicas=_COUNT,
                maxReplicas=_COUNT,
                rayStartParams=_STRINGS,
                template={"type": "object"},
            ),
        },
    ),
)


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    (manifest,) = load("rayjob.yaml")
    return manifest


def pods(ray_job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_kuberay_knows_every_field(ray_job):
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(ray_job["spec"], RAY_JOB)


def test_kubernetes_takes_the_pods_of_the_cluster(ray_job):
    for template in pods(ray_job):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}}
        kubernetes_validate.validate(pod | {"template": template}, KUBERNETES, strict=True)


def test_kubernetes_takes_what_the_schedule_needs():
    for manifest in load("cronjob.yaml"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_run_never_starts_beside_another():
    cron = next(m for m in load("cronjob.yaml") if m["kind"] == "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"


def test_the_cluster_asks_for_a_token(ray_job):
    assert ray_job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_every_mount_has_its_volume_and_every_config_map_is_made(ray_job):
    made = {entry["name"] for entry in load("kustomization.yaml")[0]["configMapGenerator"]}
    cron = next(m for m in load("cronjob.yaml") if m["kind"] == "CronJob")
    for template in [*pods(ray_job), cron["spec"]["jobTemplate"]["spec"]["template"]]:
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        used = {v["configMap"]["name"] for v in volumes.values() if "configMap" in v}
        assert used <= made


def test_what_kustomize_includes_is_there():
    kustomization = load("kustomization.yaml")[0]
    files = [file for entry in kustomization["configMapGenerator"] for file in entry["files"]]
    for name in [*kustomization["resources"], *files]:
        assert (DEPLOY / name).is_file()


def test_ray_is_the_version_that_is_installed(ray_job):
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_example_job_fits_the_cluster(ray_job):
    job = job_from_file(DEPLOY / "job.yaml")
    (workers,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    container = workers["template"]["spec"]["containers"][0]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert job.pp == gpus == int(workers["rayStartParams"]["num-gpus"])
    assert job.replicas == workers["minReplicas"]
    assert job.address == "auto"


def test_stopping_a_job_leaves_it_its_time_of_grace(ray_job):
    head = pods(ray_job)[0]["spec"]["containers"][0]
    waits = {entry["name"]: entry["value"] for entry in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert int(waits) > Job.model_fields["grace_seconds"].default


def test_the_image_holds_all_the_packages():
    copied = set(re.findall(r"^COPY (\w+) \1$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    assert copied == {"schemas", "model", "pipeline", "jobs"}
