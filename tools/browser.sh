#!/bin/sh
# The dashboards are tested in a real Chromium. Where CI is set and there is none, install it; else say how, and let those tests be skipped.
for name in "${CHROME:-}" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ -n "${CI:-}" ] && command -v apt-get >/dev/null 2>&1; then
    echo 'test: no Chromium here; installing it with apt-get (once, about a minute)'
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    if $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends chromium >/dev/null &&
        command -v chromium >/dev/null 2>&1; then exit 0; fi
fi
echo '*** No Chromium: the tests of the dashboards in tests/ui will be SKIPPED. ***'
echo '*** Install it (Debian: apt-get install chromium), or name it: CHROME=/path/to/chromium make test ***'
