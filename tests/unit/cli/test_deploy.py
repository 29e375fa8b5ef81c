"""What deploy/ starts as services: verbs that exist, codes after which nobody should try again, an image with all that it needs."""

from __future__ import annotations

import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

import click
import pytest
import typer
import yaml

from fedpeft.cli.main import DEFECT, INTERRUPTED, tree
from fedpeft.errors import EXIT_CODES, CohortError, LinkError, StorageError

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
PASSING = {LinkError.exit_code, StorageError.exit_code, CohortError.exit_code, DEFECT, INTERRUPTED}
"""What may be over by itself: the other side is away, the disk is full, too few sites, a defect met once."""
LASTING = sorted({2, *EXIT_CODES.values()} - PASSING)


class Keys(ConfigParser):
    """systemd's files, whose keys have capitals and may come twice."""

    optionxform = staticmethod(str)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DEPLOY / "container/compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def pods():
    return {path.stem: list(yaml.safe_load_all(path.read_text())) for path in (DEPLOY / "kubernetes").glob("*.yaml")}


def template(documents):
    return next(found["spec"]["template"]["spec"] for found in documents if found["kind"] in {"Job", "Deployment"})


def resolved(words):
    """The verb that ``words`` call, parsed but not run."""
    command, context = typer.main.get_command(tree()), None
    while isinstance(command, click.Group):
        context = click.Context(command, parent=context, info_name=words[0])
        _, command, words = command.resolve_command(context, list(words))
    return command.make_context(command.name, words, parent=context).info_name


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_run_a_verb_and_retry_what_may_pass(path, monkeypatch, tmp_path):
    unit = Keys(strict=False, interpolation=None)
    unit.read(path)
    service = unit["Service"]
    monkeypatch.chdir(tmp_path)
    program, *words = service["ExecStart"].split()
    assert (program, resolved(words)) == ("/opt/fedpeft/bin/fedpeft", words[1])
    assert [int(code) for code in service["RestartPreventExitStatus"].split()] == LASTING


def test_containers_run_the_same_verbs(services, pods):
    said = {tuple(service["command"][:2]) for service in services.values()}
    said |= {tuple(container["args"][:2]) for name in ("coordinator", "site") for container in template(pods[name])["containers"]}
    units = {tuple(re.search(r"ExecStart=\S+ (\S+) (\S+)", path.read_text()).groups()) for path in UNITS}
    assert said == units
    for service in services.values():
        resolved(service["command"])


def test_a_job_of_kubernetes_is_not_tried_again_after_a_lasting_fault(pods):
    job = next(found for found in pods["coordinator"] if found["kind"] == "Job")
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == LASTING


@pytest.mark.parametrize("name", ["coordinator", "site"])
def test_every_volume_that_is_mounted_is_there(pods, name):
    spec = template(pods[name])
    there = {volume["name"] for volume in spec["volumes"]}
    mounted = {
        mount["name"] for part in ("initContainers", "containers") for container in spec[part] for mount in container["volumeMounts"]
    }
    assert mounted == there


def test_the_image_has_what_the_project_installs():
    lines = (DEPLOY / "container/Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pin = next(found for found in project["project"]["dependencies"] if found.startswith("torch=="))
    assert pin in lines
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {Path(package).parts[0] for package in wheel["packages"]} | set(wheel["force-include"]) | {"pyproject.toml", "README.md"}
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", lines, re.MULTILINE) for word in line.split()}
    kept = {line[1:] for line in (DEPLOY / "container/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept == wanted
    for name in re.search(r"EXTRAS=(\S+)", lines)[1].split(","):
        assert name in project["project"]["optional-dependencies"]
