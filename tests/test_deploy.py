"""Deployment: manifests against the schemas of Kubernetes, scripts against a stub of gcloud."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from omni_jax.cli.serve import serve
from omni_jax.serve import app
from omni_jax.training.command import EXIT_REFUSED

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SCRIPTS = ROOT / "docs" / "tpu"
VERSION = "1.33"


def validate(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, VERSION, strict=True)


def rendered(overlay: str) -> dict[str, dict[str, Any]]:
    """The manifests of an overlay, by kind."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}


def in_base() -> dict[str, dict[str, Any]]:
    resources = yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["resources"]
    manifests = [yaml.safe_load((KUBERNETES / "base" / name).read_text()) for name in resources]
    return {manifest["kind"]: manifest for manifest in manifests}


def check_deployment(deployment: dict[str, Any]) -> dict[str, Any]:
    """The container, which the options of `omni-jax serve` fit."""
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    command, *options = container["args"]
    assert command == "serve"
    known = {name for option in typer.main.get_command(typer_app()).params for name in option.opts}
    assert {option.partition("=")[0] for option in options} <= known
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/cache", "/keys"} <= mounted
    return container


def typer_app() -> typer.Typer:
    found = typer.Typer()
    found.command()(serve)
    return found


def test_kubernetes_manifests():
    manifests = in_base()
    for kind, manifest in manifests.items():
        if kind != "PodMonitoring":  # of Google Cloud; its schema is not published as a file
            validate(manifest)
    container = check_deployment(manifests["Deployment"])
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selected in (
        manifests["Service"]["spec"]["selector"],
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["PodMonitoring"]["spec"]["selector"]["matchLabels"],
    ):
        assert selected.items() <= labels.items()
    [port] = container["ports"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    claim = manifests["PersistentVolumeClaim"]["metadata"]["name"]
    volumes = manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"claimName": claim} in [volume.get("persistentVolumeClaim") for volume in volumes]


def test_a_pod_ends_after_its_requests():
    """preStop and the longest request fit into the time that Kubernetes waits before it kills."""
    spec = in_base()["Deployment"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    seconds = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    longest = next(
        param.default for param in typer.main.get_command(typer_app()).params if param.name == "request_timeout"
    )
    assert seconds + longest < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize(("overlay", "resource"), [("tpu", "google.com/tpu"), ("gpu", "nvidia.com/gpu")])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_overlays(overlay, resource):
    manifests = rendered(overlay)
    assert set(manifests) == set(in_base())
    validate(manifests["Deployment"])
    container = check_deployment(manifests["Deployment"])
    assert container["resources"]["limits"][resource] == "1"
    assert container["image"].startswith("omni_jax:")
    assert manifests["Deployment"]["spec"]["template"]["spec"]["nodeSelector"]


def test_jobset():
    jobset = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    [slices] = jobset["spec"]["replicatedJobs"]
    # A JobSet's schema is not among those of Kubernetes; it consists of jobs, whose schema is.
    validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": slices["template"]["spec"]}
    )
    [rule] = slices["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [EXIT_REFUSED]
    pod = slices["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    folder = {variable["name"]: variable["value"] for variable in container["env"]}["JAX_COMPILATION_CACHE_DIR"]
    assert any(folder.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"])
    config = next(word for word in container["command"] if word.endswith(".yaml"))
    assert (ROOT / config).is_file()


def test_dockerfile_copies_what_is_there():
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    targets = re.findall(r"^FROM \S+ AS (\w+)", text, re.M)
    assert targets == ["base", "cpu", "tpu", "cuda"]
    for overlay in ("tpu", "gpu"):
        kustomization = yaml.safe_load((KUBERNETES / overlay / "kustomization.yaml").read_text())
        assert kustomization["images"][0]["newTag"] in targets
    kept = re.findall(r"^!(.+)", (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(), re.M)
    assert all((ROOT / name).exists() for name in kept)
    copied = re.search(r"^COPY (.+) \./$", text, re.M)[1].split()
    assert set(copied) <= set(kept)
    extras = set(re.findall(r"'\.\[([\w,]+)\]'", text))
    declared = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", declared, re.M) for group in extras for extra in group.split(","))


@pytest.fixture
def ray_serve(monkeypatch):
    """`deploy/ray_serve.py` over a stub of Ray, which is not among the project's packages."""
    stub = types.ModuleType("ray")
    stub.serve = types.SimpleNamespace(
        deployment=lambda cls: types.SimpleNamespace(cls=cls, options=lambda **options: Deployment(cls, options)),
        ingress=lambda: lambda cls: cls,
        Application=object,
    )
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.delitem(sys.modules, "deploy.ray_serve", raising=False)
    module = importlib.import_module("deploy.ray_serve")
    yield module
    del sys.modules["deploy.ray_serve"]


@dataclass
class Deployment:
    """What Ray would make replicas of."""

    cls: type
    options: dict[str, Any]

    def bind(self, arguments: Any) -> tuple[Deployment, Any]:
        return self, arguments


def test_ray_serve_lets_requests_wait_outside_of_replicas(ray_serve):
    arguments = ray_serve.Arguments(model="nano", max_batch_size="4", max_replicas="3", num_gpus=1, num_tpus=2)
    deployment, bound = ray_serve.build(arguments)
    assert bound is arguments
    # Ray makes an object of this type of the words on the command line.
    assert inspect.signature(ray_serve.build).parameters["arguments"].annotation is ray_serve.Arguments
    options = deployment.options
    assert options["max_ongoing_requests"] == options["autoscaling_config"]["target_ongoing_requests"] == 4
    assert options["autoscaling_config"]["max_replicas"] == 3
    assert options["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1, "resources": {"TPU": 2}}
    assert options["graceful_shutdown_timeout_s"] >= arguments.request_timeout
    with pytest.raises(ValueError, match="Extra inputs"):
        ray_serve.Arguments(max_replica=3)


def test_ray_serve_replica(ray_serve, monkeypatch):
    """A replica is ready when its model is, serves the application of `omni-jax serve`, and says when it has failed."""
    service = types.SimpleNamespace(state="warming up")

    async def wait_until_ready() -> None:
        service.state = "ready"

    service.wait_until_ready = wait_until_ready
    monkeypatch.setattr(ray_serve, "_make_service", lambda arguments: service)
    for name in ("limit_heap_growth", "log_to_stderr"):
        monkeypatch.setattr(ray_serve, name, lambda: None)
    for name in ("enable_compilation_cache", "silence_libtpu"):
        monkeypatch.setattr(ray_serve.startup, name, lambda: None)
    monkeypatch.setattr(app, "make_app", lambda service: ("app of", service))
    replica = object.__new__(ray_serve.OmniServer.cls)
    asyncio.run(replica.__init__(ray_serve.Arguments()))
    assert service.state == "ready"
    assert replica.__serve_build_asgi_app__() == ("app of", service)
    replica.check_health()
    service.state = "broken"
    with pytest.raises(RuntimeError, match="the model has failed"):
        replica.check_health()


GCLOUD = """#!/usr/bin/env bash
# A queued resource that is requested once and then active.
echo "$*" >> "$LOG"
case "$*" in
    *" create "*) [[ -e "$STATE" ]] && exit 1; touch "$STATE" ;;
    *" describe "*--format*) echo ACTIVE ;;
    *" describe "*) [[ -e "$STATE" ]] ;;
    *" delete "*) rm "$STATE" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs a script with the stub as gcloud; returns its exit code, what it printed and what it asked of gcloud."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    log = tmp_path / "log"

    def run(
        script: str, *arguments: str, path: str = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    ) -> tuple[int, str, list[str]]:
        log.write_text("")
        command = 'source "$0/env.sh" && "$0/$1" "${@:2}"'
        done = subprocess.run(
            ["/bin/bash", "-c", command, str(SCRIPTS), script, *arguments],
            env={"PATH": path, "LOG": str(log), "STATE": str(tmp_path / "state"), "HOME": os.environ["HOME"]},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, log.read_text().splitlines()

    return run


def test_scripts_can_be_repeated(cloud):
    status, output, calls = cloud("create.sh")
    assert (status, "ACTIVE" in output) == (0, True)
    assert sum(" create " in call for call in calls) == 1
    status, _, calls = cloud("create.sh")
    assert (status, sum(" create " in call for call in calls)) == (0, 0)
    assert cloud("each.sh", "true")[0] == 0
    assert cloud("delete.sh")[0] == 0


@pytest.mark.parametrize("script", ["create.sh", "delete.sh", "each.sh", "install.sh"])
def test_scripts_name_what_they_need(cloud, script, tmp_path):
    (tmp_path / "empty").mkdir()
    for program in ("bash", "dirname", "env"):
        (tmp_path / "empty" / program).symlink_to(shutil.which(program))
    status, output, _ = cloud(script, "true", path=str(tmp_path / "empty"))
    assert status == 1
    assert re.search(r"needs (git|gcloud)", output)
