"""What builds and ships this project is pinned, asks for little, and runs nobody else's code: `.github/`, `docker/` and the locks are
read, and each finding is one line. zizmor, hadolint, shellcheck and kubernetes-validate see what they know; the rules here are
those of this project that they do not."""
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
OWN = "github.event.pull_request.head.repo.full_name == github.repository" # a condition that no fork meets
TRIGGERS = {"push", "pull_request", "workflow_dispatch", "schedule"} # the others run with rights on what strangers wrote
HEAVY = {"torch", "torchvision", "fastai", "fastcore", "nbdev", "papermill", "dvc", "pandas", "joblib", "dill", "cloudpickle", "skops"} # in the service: large, or made to unpickle
PIPED = re.compile(r"\b(curl|wget)\b[^\n;]*\|\s*(sudo\s+)?(ba|z|da)?sh\b|\b(ba|z|da)?sh\s+(-c\s+)?[\"']?(<\(|\$\()\s*(curl|wget)")
INSTALL = re.compile(r"\bpip3?[\"']?\s+install\b[^\n&;]*")
IMAGE = re.compile(r"^[^@\s]+@sha256:[0-9a-f]{64}$")
Found = Iterator[tuple[str, str]] # where, what is wrong


def listed(x)->list: return [] if x is None else x if isinstance(x, list) else [x]


def commands(text:str)->Found: # of a shell script, a RUN or a run:
    "What no script may do, wherever it stands."
    text = text.replace("\\\n", " ")
    if PIPED.search(text): yield "", "runs what it downloads; name it by a hash, or take it from a lock"
    for m in INSTALL.finditer(text):
        if not re.search(r"--require-hashes|--no-index|--no-deps", m[0]): yield "", f"installs without hashes: {m[0].strip()[:80]}"
    for m in re.finditer(r"\b(npm (install|i)\b|npx\s|pipx? run\b|uvx\b|uv tool run\b|go install\b|cargo install\b)", text): yield "", f"runs {m[0].strip()}, which nothing pins"


def triggers(doc)->dict: # YAML reads a bare `on` as true
    on = doc.get("on", doc.get(True)) or {}
    return on if isinstance(on, dict) else dict.fromkeys(listed(on))


def rights(where, given, jobs)->Found:
    "Permissions of a workflow, or of a job."
    if given is None and jobs: yield where, "says no permissions, so it has the default ones; write `permissions: {contents: read}`"
    elif isinstance(given, str) and given!="read-all": yield where, f"permissions are {given}; name them one by one"
    elif isinstance(given, dict) and jobs and any(v=="write" for v in given.values()): yield where, "gives a right to write to every job; give it to the one that needs it"


def workflow(path:Path)->Found:
    "One workflow."
    try: doc = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e: return (yield path.name, f"is no YAML: {' '.join(str(e).split())[:120]}")
    on, text = triggers(doc), path.read_text()
    for t in sorted(set(on)-TRIGGERS): yield path.name, f"is started by {t}, which runs with rights on what strangers wrote; allowed: {', '.join(sorted(TRIGGERS))}"
    yield from rights(path.name, doc.get("permissions"), True)
    for name, job in (doc.get("jobs") or {}).items():
        where, said = f"{path.name}, job {name}", str(job)
        yield from rights(where, job.get("permissions"), False)
        own = OWN in " ".join(str(job.get("if", "")).split()) and "pull_request" in on
        if "pull_request" in on and not own:
            if re.search(r"\bsecrets\b", said): yield where, f"has a secret in a run that a fork can start; its `if` must ask: {OWN}"
            if re.search(r"self-hosted|vars\.", str(job.get("runs-on"))): yield where, f"runs a fork's code on a machine of ours; its `if` must ask: {OWN}"
        if job.get("secrets")=="inherit": yield where, "hands on every secret; name those that are needed"
        if re.search(r"-latest\b", str(job.get("runs-on"))): yield where, f"runs on {job['runs-on']}, which changes under us; name a version"
        if "uses" not in job and not isinstance(job.get("timeout-minutes"), int): yield where, "may run for six hours; set timeout-minutes"
        if re.search(r"prod", name+str(job.get("name"))) and not job.get("environment"): yield where, "touches prod without an environment, so nobody is asked"
        for step in listed(job.get("steps"))+([{"uses": job["uses"]}] if "uses" in job else []): yield from one_step(where, step, path.stem=="release" or "packages" in str(job.get("permissions")), text)


def one_step(where, step, release, text)->Found:
    uses, run, opts = str(step.get("uses", "")), step.get("run"), step.get("with") or {}
    if uses.startswith("docker://"):
        if not IMAGE.match(uses): yield where, f"{uses} is not named by a digest"
    elif uses and not uses.startswith("./"):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40}", uses): yield where, f"{uses} is not pinned by a commit, and a tag can be moved"
        elif text.count(uses)!=len(re.findall(re.escape(uses)+" # v\\d", text)): yield where, f"{uses} does not say its version beside the commit"
    if uses.startswith("actions/checkout@") and opts.get("persist-credentials") is not False: yield where, "checkout leaves its token in the clone; set persist-credentials: false"
    if release and (uses.startswith("actions/cache") or any("cache" in k and opts[k] not in (False, "false") for k in opts)): yield where, "takes something from a cache into a release, and any other job can write there"
    if run:
        for _, what in commands(run): yield where, what
        if e := re.search(r"\$\{\{.*?\}\}", run): yield where, f"puts {e[0]} into a command line, where a name can be a command; pass it through env"


def run_lines(root)->Found:
    "shellcheck over every run: line, as the runner would call it."
    steps = [(f"{p.name}, job {j}", s["run"]) for p in sorted((root/".github/workflows").glob("*.y*ml")) for j, job in (yaml.safe_load(p.read_text()).get("jobs") or {}).items() for s in job.get("steps", []) if "run" in s]
    for where, run in steps:
        r = subprocess.run([BIN/"shellcheck", "-s", "bash", "-f", "gcc", "-"], input=run, capture_output=True, text=True)
        for line in r.stdout.splitlines(): yield where, line.partition(": ")[2]


def dockerfile(path:Path)->Found:
    text = path.read_text().replace("\\\n", " ")
    args, stages = dict(re.findall(r"(?m)^ARG (\w+)=(\S+)", text)), set()
    for base, stage in re.findall(r"(?mi)^FROM (?:--\S+ )*(\S+)(?: AS (\S+))?", text):
        base = re.sub(r"\$\{?(\w+)\}?", lambda m: args.get(m[1], m[0]), base)
        if base not in stages and not IMAGE.match(base): yield path.name, f"builds on {base}, which is not named by a digest"
        stages.add(stage)
    for m in re.finditer(r"(?m)^# *syntax=(\S+)", text):
        if not IMAGE.match(m[1]): yield path.name, f"is read by {m[1]}, which is not named by a digest"
    if not re.search(r"(?m)^USER [1-9]\d*(:[1-9]\d*)?\s*$(?![\s\S]*^USER )", text): yield path.name, "does not end as a user with a number other than 0"
    if re.search(r"(?mi)^ADD\s+(--\S+\s+)*https?://", text): yield path.name, "ADDs from an address, which nothing pins"
    if re.search(r"(?mi)^(ARG|ENV)\s+\S*(TOKEN|SECRET|PASSWORD)", text): yield path.name, "keeps a secret in a layer; mount it"
    if path.name.startswith("serve"):
        for word in ("STOPSIGNAL SIGTERM", "HEALTHCHECK ", "org.opencontainers.image.revision", "defect-detect.bundle"):
            if word not in text: yield path.name, f"has no {word.strip()}"
    for m in re.finditer(r"(?m)^RUN (.*)$", text): yield from ((path.name, what) for _, what in commands(m[1]))


def scripts(root)->Found:
    for p in sorted([*root.glob("docker/*.sh"), *root.glob("tools/*.sh"), *root.glob(".ci/*")]):
        yield from ((p.name, what) for _, what in commands(p.read_text()))
        for m in re.finditer(r"(?m)^\w+=([\w./-]+/[\w.-]+:[\w.-]+(@\S+)?)$", p.read_text()):
            if not IMAGE.match(m[1]): yield p.name, f"runs {m[1]}, which is not named by a digest"


def compose(path:Path)->Found:
    for name, s in (yaml.safe_load(path.read_text()).get("services") or {}).items():
        where, image = f"{path.name}, {name}", s.get("image", "")
        if not image.startswith("${IMAGE:-") and not IMAGE.match(image): yield where, f"runs {image or 'an image without a name'}, which is not named by a digest"
        if s.get("read_only") is not True or s.get("cap_drop")!=["ALL"] or "no-new-privileges:true" not in s.get("security_opt", []): yield where, "lacks read_only, cap_drop: [ALL] or no-new-privileges"
        if s.get("privileged") or s.get("network_mode")=="host" or "docker.sock" in str(s.get("volumes")): yield where, "has the machine in its hands"
        for p in s.get("ports", []):
            if not str(p).startswith("127.0.0.1:"): yield where, f"opens {p} to every machine; begin it with 127.0.0.1:"


def rendered(overlay:Path)->list[dict]: # objects; what these overlays use of kustomize, and no more
    "What an overlay gives to the cluster."
    k, out = yaml.safe_load((overlay/"kustomization.yaml").read_text()), []
    if odd := set(k)-{"apiVersion", "kind", "namespace", "resources", "replicas", "patches", "labels"}: raise ValueError(f"{overlay}: {', '.join(sorted(odd))} is not known here")
    for r in k.get("resources", []): out += rendered(overlay/r) if (overlay/r).is_dir() else [d for d in yaml.safe_load_all((overlay/r).read_text()) if d]
    for o in out:
        if k.get("namespace") and o["kind"]!="Namespace": o["metadata"]["namespace"] = k["namespace"]
        for label in k.get("labels", []):
            pairs = label["pairs"]
            o["metadata"].setdefault("labels", {}).update(pairs)
            spec = o.get("spec", {})
            if o["kind"]=="Deployment": spec.setdefault("selector", {}).setdefault("matchLabels", {}).update(pairs)
            if o["kind"]=="Service": spec.setdefault("selector", {}).update(pairs)
            if o["kind"]=="Deployment": spec["template"]["metadata"].setdefault("labels", {}).update(pairs)
    for r in k.get("replicas", []): next(o for o in out if o["kind"]=="Deployment" and o["metadata"]["name"]==r["name"])["spec"]["replicas"] = r["count"]
    for p in k.get("patches", []):
        target = next(o for o in out if (o["kind"], o["metadata"]["name"])==(p["target"]["kind"], p["target"]["name"]))
        for step in yaml.safe_load(p["patch"]):
            if step["op"]!="replace": raise ValueError(f"{overlay}: a patch may only replace")
            *way, last = [int(w) if w.isdigit() else w for w in step["path"].strip("/").split("/")]
            at = target
            for w in way: at = at[w]
            at[last] = step["value"]
    return out


def pod(where, spec)->Found:
    "Kubernetes' profile `restricted`, and what it leaves open."
    s = spec.get("securityContext") or {}
    if any(spec.get(k) for k in ("hostNetwork", "hostPID", "hostIPC")): yield where, "shares the network or processes of its node"
    if any(set(v)-{"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"} for v in spec.get("volumes", [])): yield where, "has a volume of a kind that `restricted` refuses"
    if spec.get("automountServiceAccountToken") is not False: yield where, "is given a token of the cluster; set automountServiceAccountToken: false"
    for c in spec["containers"]+spec.get("initContainers", []):
        own = {**s, **(c.get("securityContext") or {})}
        for good, what in ((own.get("runAsNonRoot") is True, "runAsNonRoot: true"), (isinstance(own.get("runAsUser"), int) and own["runAsUser"]>0, "runAsUser with a number above 0"), (own.get("allowPrivilegeEscalation") is False, "allowPrivilegeEscalation: false"), (not own.get("privileged"), "privileged: false"),
                           ("ALL" in (own.get("capabilities") or {}).get("drop", []) and not set((own.get("capabilities") or {}).get("add", []))-{"NET_BIND_SERVICE"}, "capabilities: {drop: [ALL]}"), ((own.get("seccompProfile") or {}).get("type") in ("RuntimeDefault", "Localhost"), "seccompProfile: {type: RuntimeDefault}"),
                           (own.get("readOnlyRootFilesystem") is True, "readOnlyRootFilesystem: true"), (not any(p.get("hostPort") for p in c.get("ports", [])), "no hostPort"),
                           ({"cpu", "memory"}<=set((c.get("resources") or {}).get("requests", {})) and "memory" in (c.get("resources") or {}).get("limits", {}), "resources: requests of cpu and memory, a limit of memory"),
                           (all(k in c for k in ("startupProbe", "readinessProbe", "livenessProbe")), "startupProbe, readinessProbe and livenessProbe"),
                           (c.get("livenessProbe", {}).get("httpGet", {}).get("path")!=c.get("readinessProbe", {}).get("httpGet", {}).get("path"), "a liveness probe that asks something else than the readiness probe"),
                           (":" not in c["image"] or bool(IMAGE.match(c["image"])), "an image without a tag, which deploy.sh names by its digest")):
            if not good: yield where, f"{c['name']} needs {what}"


def overlays(root)->Iterator[tuple[str, list[dict]]]:
    for o in sorted((root/"docker/k8s/overlays").iterdir()): yield f"overlay {o.name}", rendered(o)


def cluster(root)->Found:
    for where, objects in overlays(root):
        of_pods = [set(o["spec"]["template"]["metadata"]["labels"].items()) for o in objects if o["kind"]=="Deployment"]
        for o in objects:
            if o["kind"] in ("Service", "PodDisruptionBudget"):
                chosen = o["spec"].get("selector") or {}
                if not (want := set(chosen.get("matchLabels", chosen).items())) or not all(want<=labels for labels in of_pods): yield where, f"has a {o['kind']} that selects no pod of ours"
            if o["kind"]=="Deployment":
                yield from pod(where, o["spec"]["template"]["spec"])
                roll = o["spec"].get("strategy", {})
                if roll.get("type")!="RollingUpdate" or roll.get("rollingUpdate", {}).get("maxUnavailable")!=0: yield where, "takes pods away before new ones answer; set maxUnavailable: 0"
            if o["kind"]=="Secret": yield where, "holds a secret, and so does git"
            if o["kind"]=="Namespace" and o["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")!="restricted": yield where, "has a namespace that does not enforce `restricted`"
        if missing := {"Namespace", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}-{o["kind"] for o in objects}: yield where, f"has no {', '.join(sorted(missing))}"


def schemas(root)->Found:
    "Each object against the schema of Kubernetes that comes with kubernetes-validate; unknown fields are refused."
    import kubernetes_validate as k
    for where, objects in overlays(root):
        for o in objects:
            try: k.validate(o, k.latest_version(), strict=True)
            except (k.ValidationError, k.SchemaNotFoundError, k.InvalidSchemaError) as e: yield f"{where}, {o['kind']}", " ".join(str(e).split())[:200]


def name_of(s): return re.sub(r"[-_.]+", "-", s).lower()


def pins(path:Path)->tuple[dict[str, str], list[str]]: # package -> version; what is wrong
    out, bad = {}, []
    for block in re.split(r"(?m)^(?=\S)", path.read_text()):
        line = block.split("\n", 1)[0]
        if not block.strip() or block.startswith("#"): continue
        m = re.match(r"([\w.-]+)==(\S+)", line)
        if not m: bad.append(f"{line[:60]!r} is no pin of a package")
        elif not re.search(r"--hash=sha256:[0-9a-f]{64}", block): bad.append(f"{m[1]} has no hash")
        else: out[name_of(m[1])] = m[2]
    return out, bad


def locks(root)->Found:
    have = {}
    for f in ("lock.txt", "docker/serve.lock", *(["lock-cpu.txt"] if (root/"lock-cpu.txt").exists() else [])):
        have[f], bad = pins(root/f)
        yield from ((f, b) for b in bad)
    big, small = have["lock.txt"], have["docker/serve.lock"]
    for n in sorted(set(small)&HEAVY): yield "docker/serve.lock", f"brings {n} into the service"
    for n, v in sorted(small.items()):
        if big.get(n)!=v: yield "docker/serve.lock", f"has {n} {v}, lock.txt has {big.get(n, 'none')}: make lock"
    asked = re.findall(r"(?m)^(?:serve_)?requirements = (.*)$", (root/"settings.ini").read_text())
    for n in sorted({name_of(re.split(r"[\[=<>]", w)[0]) for line in asked for w in line.split()}-set(small)): yield "docker/serve.lock", f"lacks {n}, which settings.ini asks for: make lock"
    for f in ("lock.txt", "docker/serve.lock"):
        for line in (root/"constraints.txt").read_text().splitlines():
            if (m := re.match(r"([\w.-]+)==(\S+)", line)) and have[f].get(name_of(m[1]), m[2])!=m[2]: yield f, f"has {m[1]} {have[f][name_of(m[1])]}, constraints.txt says {m[2]}: make lock"


def linters(root)->Found:
    "What linters that others keep say."
    r = subprocess.run([BIN/"zizmor", "--offline", "--no-progress", "--persona", "auditor", "--strict-collection", "--format", "json", root/".github"], capture_output=True, text=True)
    try: found = json.loads(r.stdout)
    except ValueError: yield "zizmor", (r.stderr or r.stdout).strip()[-300:]
    else:
        for f in found: yield "zizmor", f"{f['ident']}: {f['desc']} {f['url']}"
    r = subprocess.run([BIN/"hadolint", "--no-color", *sorted(root.glob("docker/*.Dockerfile"))], capture_output=True, text=True)
    yield from (("hadolint", s.replace(f"{root}/", "")) for s in (r.stdout+r.stderr).splitlines())
    files = sorted([*root.glob("docker/*.sh"), *root.glob("tools/*.sh")])
    r = subprocess.run([BIN/"shellcheck", "-f", "gcc", *files], capture_output=True, text=True)
    yield from (("shellcheck", s.replace(f"{root}/", "")) for s in (r.stdout+r.stderr).splitlines())


def parts(root:Path=ROOT)->dict[str, Callable[[], Found]]: # what is looked at -> its findings
    "Everything."
    out = {p.name: partial(workflow, p) for p in sorted((root/".github/workflows").glob("*.y*ml"))}
    out |= {p.name: partial(dockerfile, p) for p in sorted(root.glob("docker/*Dockerfile"))}
    out |= {p.name: partial(compose, p) for p in sorted(root.glob("docker/compose*.y*ml"))}
    return out|{f.__name__: partial(f, root) for f in (run_lines, scripts, locks, cluster, schemas, linters)}


def main(root:Path=ROOT):
    bad = [f"{where}: {what}" for part in parts(root).values() for where, what in part()]
    print("\n".join(bad) or "nothing was found")
    sys.exit(bool(bad))


if __name__=="__main__": main(*map(Path, sys.argv[1:2]))
