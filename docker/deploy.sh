#!/bin/sh
# Let a stage run an image, named by its digest; from the root of the repository:
#   docker/deploy.sh dev kubernetes ghcr.io/me/defect-detect@sha256:...    kubectl's cluster, or that of $KUBE_CONFIG (its text)
#   docker/deploy.sh prod compose ghcr.io/me/defect-detect@sha256:...      docker's host, needs DEFECT_TOKEN
set -eu
[ $# -eq 3 ] || { echo "error: $# words; allowed: dev|prod kubernetes|compose IMAGE@sha256:..." >&2; exit 2; }
stage=$1 target=$2 image=$3
case $stage in dev|prod) ;; *) echo "error: stage $stage; allowed: dev, prod" >&2; exit 2;; esac
echo "$image" | grep -Eq '^[^@ ]+@sha256:[0-9a-f]{64}$' || { echo "error: image $image; a digest is needed: name@sha256: and 64 hex digits" >&2; exit 2; }
case $target in
kubernetes)
  # kustomize reads nothing outside its folder but by a relative path, so the image stands in a folder beside the overlays
  work=$(mktemp -d docker/k8s/deploy.XXXXXX)
  trap 'rm -rf "$work"' EXIT
  if [ -n "${KUBE_CONFIG:-}" ]; then
    (umask 077; printf '%s' "$KUBE_CONFIG" > "$work/kube")
    export KUBECONFIG="$work/kube"
  fi
  cat > "$work/kustomization.yaml" <<K
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../overlays/$stage]
images:
  - name: defect-detect-serve
    newName: ${image%@*}
    digest: ${image#*@}
K
  kubectl apply -k "$work"
  # a new pod that is never ready leaves the old ones answering; then what was deployed is taken back
  kubectl -n "defect-detect-$stage" rollout status deployment/defect-detect --timeout=5m || { kubectl -n "defect-detect-$stage" rollout undo deployment/defect-detect; exit 1; };;
compose) IMAGE=$image docker compose -f docker/compose.yaml --project-directory . -p "defect-detect-$stage" up -d --no-build --wait --wait-timeout 300;;
*) echo "error: target $target; allowed: kubernetes, compose" >&2; exit 2;;
esac
