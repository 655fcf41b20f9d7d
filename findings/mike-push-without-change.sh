#!/usr/bin/env bash
# mike: `mike deploy`, then `mike set-default --push`, pushes nothing if the default was set before. Its exit code is 0.
#
# The usual script for a release deploys a version without a push, sets the default version, and pushes once. From the second
# release on, the default is already set. Then set-default warns that nothing has changed, and leaves out the push. The commit
# of the new version stays local. `git push origin gh-pages` pushes it.
# Seen: mike 2.2.0: warning: nothing changed in commit. Versions on the remote: 1.0. Local versions: 2.0 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet mike==2.2.0 mkdocs==1.6.1
export PATH="$folder/env/bin:$PATH" GIT_CONFIG_GLOBAL="$folder/gitconfig" GIT_CONFIG_SYSTEM=/dev/null NO_MKDOCS_2_WARNING=1
git config --global user.name finding
git config --global user.email finding@example.org
git init --quiet --bare "$folder/remote"
git init --quiet "$folder/site"
cd "$folder/site"
git remote add origin "$folder/remote"
mkdir docs
echo "# A page" >docs/index.md
echo "site_name: site" >mkdocs.yml
git add .
git commit --quiet --message "Add a page"
for version in 1.0 2.0; do
    mike deploy --update-aliases "$version" latest >"$folder/log" 2>&1
    said=$(mike set-default --push latest 2>&1)
done
versions() { git "$@" show gh-pages:versions.json | grep '"version"' | grep -o '[0-9.]*' | xargs; }
remote=$(versions --git-dir "$folder/remote")
local=$(versions)
echo "$(mike --version | cut -d' ' -f1,2): $(head -1 <<<"$said"). Versions on the remote: $remote. Local versions: $local"
test "$remote" = "1.0"
test "$local" = "2.0 1.0"
