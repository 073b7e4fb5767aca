"Faults of a supply chain, each planted into a copy of ours: the gate sees every one, and nothing in ours."
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tools"))
from supply_chain import OWN, parts, rendered # noqa: E402

CI, TRAIN, RELEASE = (f".github/workflows/{n}.yml" for n in ("ci", "train", "release"))
SERVE, COMPOSE, POD, LOCK, DEV = "docker/serve.Dockerfile", "docker/compose.yaml", "docker/k8s/base/deployment.yaml", "docker/serve.lock", "docker/k8s/overlays/dev"
STEP = "      - run: make install\n"
FAULTS = dict( # name -> file, what to replace (a pattern, once), by what, which part sees it, what it says
    action_by_tag=(CI, r"actions/checkout@\w{40} # v6.0.1", "actions/checkout@v6", "ci.yml", "not pinned by a commit"),
    action_by_branch=(TRAIN, r"actions/setup-python@\w{40} # v6.2.0", "actions/setup-python@main", "train.yml", "not pinned by a commit"),
    action_by_short_commit=(CI, r"(actions/checkout@\w{12})\w{28}", r"\1", "ci.yml", "not pinned by a commit"),
    action_without_version=(CI, r"(actions/checkout@\w{40}) # v6.0.1", r"\1", "ci.yml", "does not say its version"),
    action_from_an_image=(CI, STEP, STEP+"      - uses: docker://alpine:3.20\n", "ci.yml", "not named by a digest"),
    no_permissions=(CI, r"permissions:\n  contents: read\n", "", "ci.yml", "says no permissions"),
    all_permissions=(CI, r"permissions:\n  contents: read\n", "permissions: write-all\n", "ci.yml", "name them one by one"),
    writes_everywhere=(TRAIN, r"permissions:\n  contents: read\n", "permissions:\n  contents: write\n", "train.yml", "right to write to every job"),
    pull_request_target=(CI, "  pull_request:\n", "  pull_request_target:\n", "ci.yml", "started by pull_request_target"),
    workflow_run=(CI, "  pull_request:\n", "  workflow_run: {workflows: [Train]}\n", "ci.yml", "started by workflow_run"),
    secret_for_a_fork=(CI, STEP, STEP+"        env: {KEY: '${{ secrets.DVC_KEY }}'}\n", "ci.yml", "a secret in a run that a fork can start"),
    label_of_a_fork=(TRAIN, r" && "+re.escape(OWN), "", "train.yml", "a secret in a run that a fork can start"),
    gpu_for_a_fork=(CI, "runs-on: ubuntu-24.04", "runs-on: [self-hosted, gpu]", "ci.yml", "a fork's code on a machine of ours"),
    cache_in_release=(RELEASE, r'python-version: "3.11"', 'python-version: "3.11"\n          cache: pip', "release.yml", "from a cache into a release"),
    title_as_command=(CI, STEP, STEP+"      - run: echo ${{ github.event.pull_request.title }}\n", "ci.yml", "a name can be a command"),
    branch_as_command=(TRAIN, r'"\$BRANCH" made/report', '"${{ github.head_ref }}" made/report', "train.yml", "a name can be a command"),
    token_left_behind=(CI, r"        with:\n          persist-credentials: false\n", "", "ci.yml", "leaves its token"),
    piped_from_the_web=(CI, STEP, STEP+"      - run: curl -sSL https://example.org/install.sh | sudo bash\n", "ci.yml", "runs what it downloads"),
    unhashed_in_ci=(CI, STEP, STEP+"      - run: pip install -U nbdev\n", "ci.yml", "installs without hashes"),
    npx_in_ci=(CI, STEP, STEP+"      - run: npx semantic-release\n", "ci.yml", "which nothing pins"),
    moving_runner=(CI, "runs-on: ubuntu-24.04", "runs-on: ubuntu-latest", "ci.yml", "changes under us"),
    prod_asks_nobody=(RELEASE, r"    environment: \$\{\{ contains.*\n", "", "release.yml", "so nobody is asked"),
    unquoted_name=(TRAIN, r'run record "ci-\$GITHUB_RUN_ID"', "run record ci-$GITHUB_RUN_ID-$1", "run_lines", "SC2086"),
    known_to_zizmor=(CI, "  workflow_dispatch:.*\n", "  workflow_dispatch:\nenv:\n  ACTIONS_ALLOW_UNSECURE_COMMANDS: true\n", "linters", "insecure-commands"),
    base_by_tag=(SERVE, r"(FROM \S+)@sha256:\w+ AS", r"\1 AS", SERVE[7:], "not named by a digest"),
    root_in_the_image=(SERVE, "USER 65534:65534", "USER root", SERVE[7:], "does not end as a user with a number"),
    user_by_name=(SERVE, "USER 65534:65534", "USER nobody", SERVE[7:], "does not end as a user with a number"),
    unhashed_in_the_image=(SERVE, "ENV PATH", "RUN pip install --no-cache-dir fastapi==0.165.0\nENV PATH", SERVE[7:], "installs without hashes"),
    added_from_the_web=(SERVE, "EXPOSE 8000", "ADD https://example.org/model.onnx /bundle/\nEXPOSE 8000", SERVE[7:], "ADDs from an address"),
    no_health_check=(SERVE, r"HEALTHCHECK [\s\S]*?\n    CMD.*\n", "", SERVE[7:], "has no HEALTHCHECK"),
    known_to_hadolint=(SERVE, "EXPOSE 8000", "EXPOSE 8000\nRUN cd /tmp && ls", "linters", "DL3003"),
    unhashed_in_the_script=("docker/install.sh", "--require-hashes ", "", "scripts", "installs without hashes"),
    builder_by_tag=("docker/build.sh", r"(buildkit=\S+)@sha256:\w+", r"\1", "scripts", "not named by a digest"),
    open_to_all=(COMPOSE, "127.0.0.1:9090:9090", "9090:9090", COMPOSE[7:], "to every machine"),
    prometheus_by_tag=(COMPOSE, r"@sha256:\w+", "", COMPOSE[7:], "not named by a digest"),
    writable_container=(COMPOSE, "read_only: true", "read_only: false", COMPOSE[7:], "lacks read_only"),
    docker_socket=(COMPOSE, "- history:/prometheus", "- /var/run/docker.sock:/var/run/docker.sock", COMPOSE[7:], "in its hands"),
    unhashed_lock=(LOCK, r"(h11==[\d.]+) \\\n(    --hash=\S+( \\)?\n)+", r"\1\n", "locks", "h11 has no hash"),
    url_in_lock=(LOCK, r"h11==[\d.]+", "h11 @ https://example.org/h11.whl", "locks", "no pin of a package"),
    torch_in_the_service=(LOCK, r"\Ah?", "torch==2.14.1 --hash=sha256:"+64*"0"+"\n", "locks", "brings torch into the service"),
    drifted_lock=(LOCK, r"h11==[\d.]+", "h11==0.15.0", "locks", "h11 0.15.0, lock.txt has"),
    forgotten_pin=("constraints.txt", r"numpy==[\d.]+", "numpy==2.4.5", "locks", "constraints.txt says 2.4.5"),
    root_in_the_pod=(POD, "        runAsNonRoot: true\n", "", "cluster", "needs runAsNonRoot"),
    user_0_in_the_pod=(POD, "runAsUser: 65534", "runAsUser: 0", "cluster", "needs runAsUser"),
    escalation=(POD, "            allowPrivilegeEscalation: false\n", "", "cluster", "needs allowPrivilegeEscalation"),
    capabilities=(POD, r"drop: \[ALL\]", "drop: [NET_RAW]", "cluster", "needs capabilities"),
    no_seccomp=(POD, "        seccompProfile: .*\n", "", "cluster", "needs seccompProfile"),
    writable_pod=(POD, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "cluster", "needs readOnlyRootFilesystem"),
    host_network=(POD, "      enableServiceLinks: false", "      hostNetwork: true\n      enableServiceLinks: false", "cluster", "shares the network"),
    no_memory_limit=(POD, "limits: {memory: 2Gi}", "limits: {}", "cluster", "a limit of memory"),
    one_probe_for_two=(POD, "path: /healthz/live", "path: /healthz/ready", "cluster", "something else than the readiness"),
    gap_in_the_roll=(POD, "maxUnavailable: 0", "maxUnavailable: 1", "cluster", "before new ones answer"),
    open_namespace=(DEV+"/namespace.yaml", "enforce: restricted", "enforce: baseline", "cluster", "does not enforce"),
    no_budget=("docker/k8s/base/kustomization.yaml", " disruption.yaml,", "", "cluster", "has no PodDisruptionBudget"),
    budget_of_nothing=("docker/k8s/base/disruption.yaml", "  selector: .*\n", "", "cluster", "selects no pod"),
    unknown_field=(POD, "periodSeconds: 10", "periodSecond: 10", "schemas", "periodSecond"))


@pytest.fixture
def copy(tmp_path):
    for d in (".github", "docker", ".ci"): shutil.copytree(ROOT/d, tmp_path/d)
    (tmp_path/"tools").mkdir()
    for f in ("lock.txt", "constraints.txt", "settings.ini", *(str(p.relative_to(ROOT)) for p in ROOT.glob("tools/*.sh"))): shutil.copy(ROOT/f, tmp_path/f)
    return tmp_path


def test_ours_has_none():
    found = {name: list(part()) for name, part in parts().items()}
    assert not any(found.values()), found
    assert {"ci.yml", "train.yml", "release.yml", "nightly.yml", "docs.yml", "serve.Dockerfile", "train.Dockerfile", "compose.yaml", "run_lines", "scripts", "locks", "cluster", "schemas", "linters"}==set(found)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(copy, name):
    file, old, new, part, says = FAULTS[name]
    text, n = re.subn(old, new, (copy/file).read_text(), count=1)
    assert n==1 and text!=(copy/file).read_text(), "the fault is not planted"
    (copy/file).write_text(text)
    found = [f"{w}: {s}" for w, s in parts(copy)[part]()]
    assert any(says in s for s in found), found


def test_the_overlays_are_as_kubectl_puts_them():
    "Where kubectl is; it can do without a cluster."
    if not shutil.which("kubectl"): return
    for overlay in sorted((ROOT/"docker/k8s/overlays").iterdir()):
        said = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, timeout=60)
        assert said.returncode==0, said.stderr
        key = lambda o: o["kind"]
        assert sorted(yaml.safe_load_all(said.stdout), key=key)==sorted(rendered(overlay), key=key)


@pytest.mark.parametrize("words,says", [(["dev", "kubernetes", "ghcr.io/me/serve:latest"], "a digest is needed"), (["test", "kubernetes", "x@sha256:"+64*"0"], "allowed: dev, prod"), (["dev", "swarm", "x@sha256:"+64*"0"], "allowed: kubernetes, compose"), (["dev"], "1 words")])
def test_what_is_deployed_has_a_digest(words, says):
    r = subprocess.run([ROOT/"docker/deploy.sh", *words], capture_output=True, text=True, timeout=60)
    assert r.returncode==2 and says in r.stderr and len(r.stderr.splitlines())==1
