#!/bin/sh
# Put a report on the pull request of a branch, as one comment that is updated in place; with no pull request, do nothing:
#   tools/comment.sh my-branch report/report.md
set -eu
[ $# -eq 2 ] && [ -s "$2" ] || { echo "error: $*; allowed: BRANCH FILE, and something must be in the file" >&2; exit 2; }
number=$(gh pr list --head "$1" --json number,isCrossRepository --jq '[.[] | select(.isCrossRepository | not)][0].number // empty')
[ -n "$number" ] || { echo "$1 has no open pull request"; exit 0; }
here="repos/{owner}/{repo}/issues"
# the first line of a report is its mark, and only a comment of the one who writes now is changed
mark=$(head -n1 "$2")
old=$(MARK=$mark gh api --paginate "$here/$number/comments" --jq '.[] | select((.body | startswith(env.MARK)) and .user.type == "Bot") | .id' | tail -n1)
if [ -n "$old" ]; then gh api --method PATCH "$here/comments/$old" -F "body=@$2" --jq .html_url
else gh api --method POST "$here/$number/comments" -F "body=@$2" --jq .html_url; fi
