"""Pages in a headless Chromium, where one is installed."""

import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
NODE = shutil.which("node")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)


def chromium(page, *options):
    """Open the page; returns what Chromium printed."""
    command = [CHROMIUM, *OPTIONS, *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_in_page(page, script):
    """The JSON text that `script`, run at the page's end, assigns to `answer`."""
    html = page.read_text()
    assert "</body>" in html
    close = "; document.body.innerHTML = '<pre id=answer></pre>';"
    show = "document.getElementById('answer').textContent = JSON.stringify(answer);"
    changed = page.with_name("asked.html")
    changed.write_text(
        html.replace("</body>", f"<script>let answer; {script}{close}{show}</script></body>")
    )
    found = re.search(r'<pre id="answer">(.*?)</pre>', chromium(changed, "--dump-dom"), re.DOTALL)
    assert found, "the page's script failed"
    return found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
