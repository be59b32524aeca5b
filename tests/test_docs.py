"The documentation site builds without the network, is complete and whole, and looks right in a browser."
from __future__ import annotations
import ast, functools, http.server, json, re, shutil, subprocess, sys, threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
GROUPS = {'Chapters': '', 'Tutorials': 'tutorials', 'Baselines': 'baselines'}
CHROMIUM = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
DRIVER = shutil.which('chromedriver')
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The built site."
    folder = tmp_path_factory.mktemp('site')
    cmd = [sys.executable, 'docs/build.py', '--out', folder/'html', '--work', folder/'sources']
    done = subprocess.run(cmd, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder/'html'


@pytest.fixture(scope='module')
def pages(site: Path) -> dict[str, BeautifulSoup]:
    "Every page, parsed, by its path in the site."
    return {p.relative_to(site).as_posix(): BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
            for p in sorted(site.rglob('*.html')) if '_static' not in p.parts}


def page_of(notebook: Path) -> str:
    return (notebook.relative_to(NBS).parent/re.sub(r'^\d+\w*?_', '', notebook.name.lower())).with_suffix('.html').as_posix()


def modules() -> list[str]:
    return sorted(p.stem for p in (ROOT/'mwt').glob('*.py') if p.name[0] != '_')


def exported(module: str) -> list[str]:
    "What the module's notebook exports: nbdev's list on top of the file."
    listed = re.search(r'^__all__ = (\[.*?\])', (ROOT/'mwt'/f'{module}.py').read_text(encoding='utf-8'), flags=re.M | re.S)
    return ast.literal_eval(listed[1])


# The files

@pytest.mark.parametrize('module', modules())
def test_every_public_symbol_is_in_the_reference(module: str, pages: dict[str, BeautifulSoup]) -> None:
    public = exported(module)
    if not public: return
    reference = pages[f'reference/{module}.html']
    entries = {h.code.get_text(): h.find_parent('section') for h in reference.select('section > h2') if h.code}
    assert not set(public) - entries.keys()
    listed = {a.get_text() for a in pages['reference/index.html'].select('table a')}
    for name in public:
        assert entries[name].get('id') and entries[name].select_one('div.highlight'), f'{name} has no anchor or no signature'
        link = entries[name].select_one('p.where a')
        assert link and '#' in link['href'], f'{name} does not link to its chapter'
    assert not set(public) - listed


def test_chapters_stand_in_reading_order(pages: dict[str, BeautifulSoup]) -> None:
    tree = pages['index.html'].select_one('.sidebar-tree')
    shown = {caption.get_text(): [a['href'] for a in caption.find_next('ul').select('a')] for caption in tree.select('p.caption')}
    for caption, folder in GROUPS.items():
        expected = [page_of(p) for p in sorted((NBS/folder).glob('*.ipynb')) if p.name != 'index.ipynb']
        assert shown.get(caption, []) == expected
        assert not set(expected) - pages.keys()
    assert list(shown) == [c for c in (*GROUPS, 'API reference') if c in shown]


def test_exported_code_is_shown_and_hidden_cells_are_not(pages: dict[str, BeautifulSoup]) -> None:
    squeezed = lambda text: re.sub(r'\s+', '', text)
    for path in sorted(NBS.rglob('*.ipynb')):
        if path.name == 'index.ipynb' or '.ipynb_checkpoints' in path.parts: continue
        text = squeezed(pages[page_of(path)].select_one('article').get_text())
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            code = ''.join(cell['source'])
            body = squeezed(re.sub(r'^#\|.*$', '', code, flags=re.M))
            if cell['cell_type'] != 'code' or not body: continue
            if re.match(r'#\|\s*exports?\s*$', code, flags=re.M): assert body in text, f'{path.name} does not show\n{code}'
            if re.match(r'#\|\s*hide\s*$', code, flags=re.M) and len(body) > 60: assert body not in text, f'{path.name} shows\n{code}'


def test_no_dead_link(site: Path, pages: dict[str, BeautifulSoup]) -> None:
    anchors = {page: {t['id'] for t in soup.select('[id]')} for page, soup in pages.items()}
    dead = []
    for page, soup in pages.items():
        for href in {a['href'] for a in soup.select('a[href]')}:
            if urlparse(href).scheme or href.startswith('//'): continue
            target, fragment = urldefrag(href)
            file = (site/page).parent/unquote(target) if target else site/page
            name = file.resolve().relative_to(site.resolve()).as_posix()
            if not file.is_file() or (fragment and unquote(fragment) not in anchors.get(name, ())): dead.append(f'{page}: {href}')
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, BeautifulSoup]) -> None:
    far = re.compile(r'^(?:https?:)?//')
    for page, soup in pages.items():
        loaded = [t.get('src') or t.get('href') for t in soup.select('[src], link[rel~=stylesheet], link[rel~=icon], link[rel~=preload]')]
        assert not [u for u in loaded if far.match(u)], page
        missing = [u for u in loaded if not u.startswith('data:') and not ((site/page).parent/urlparse(u).path).is_file()]
        assert not missing, page
    for css in site.rglob('*.css'): assert not re.search(r'(?:url\(|@import)\s*["\']?(?:https?:)?//', css.read_text(encoding='utf-8')), css


# In a browser

@pytest.fixture(scope='module')
def address(site: Path) -> Iterator[str]:
    "The site, served on the loopback interface."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if not (CHROMIUM and DRIVER): pytest.skip('needs chromium and chromedriver (Debian: chromium, chromium-driver)')
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]: options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(30)
    driver.get('about:blank')
    driver.get_log('browser')
    yield driver
    driver.quit()


def resize(browser, width: int) -> None:
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)


def complaints(browser, address: str) -> list[str]:
    "What went wrong since the last call: console errors, failed requests, requests to other places."
    found = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
    asked: dict[str, str] = {} # the browser's own pages make requests too; only those of ours count
    for entry in browser.get_log('performance'):
        event = json.loads(entry['message'])['message']
        kind, said = event['method'], event['params']
        if kind == 'Network.requestWillBeSent' and said['documentURL'].startswith(address):
            asked[said['requestId']] = url = said['request']['url']
            if not url.startswith((address, 'data:', 'blob:')): found.append(f'asks for {url}')
        if said.get('requestId') not in asked: continue
        if kind == 'Network.responseReceived' and said['response']['status'] >= 400: found.append(f"no {asked[said['requestId']]}")
        if kind == 'Network.loadingFailed' and not said.get('canceled'): found.append(f"{said['errorText']}: {asked[said['requestId']]}")
    return found


# Waits for MathJax where a page has formulas, then reports what is not as it should be.
LOOK = '''
const [width, done] = arguments;
const started = () => new Promise(resolve => {
  const since = Date.now();
  const timer = setInterval(() => {
    if (!window.MathJax?.startup?.promise && Date.now() - since < 10000) return;
    clearInterval(timer);
    resolve(window.MathJax?.startup?.promise);
  }, 10);
});
const ready = document.querySelector('.math') ? started() : Promise.resolve();
ready.then(() => {
  const page = document.documentElement, content = document.querySelector('.content'), wrong = [];
  if (page.scrollWidth > width) wrong.push(`page is ${page.scrollWidth} wide in a window of ${width}`);
  if (content.scrollWidth > content.clientWidth) {
    const edge = content.getBoundingClientRect().right;
    const wide = [...content.querySelectorAll('*')].find(e => e.getBoundingClientRect().right > edge + 1);
    wrong.push(`content is ${content.scrollWidth} wide in ${content.clientWidth}: ${wide?.outerHTML.slice(0, 200)}`);
  }
  for (const m of document.querySelectorAll('.math')) if (!m.querySelector('mjx-container')) wrong.push(`not typeset: ${m.textContent}`);
  for (const m of document.querySelectorAll('mjx-merror, [data-mjx-error]')) wrong.push(`formula with an error: ${m.textContent}`);
  for (const i of document.querySelectorAll('article img')) if (!i.complete || !i.naturalWidth) wrong.push(`no picture: ${i.src}`);
  done(wrong);
});
'''


@pytest.mark.parametrize('width', [1440, 1100, 390])
def test_every_page_looks_right(width: int, pages: dict[str, BeautifulSoup], address: str, browser) -> None:
    resize(browser, width)
    wrong = {}
    for page in pages:
        browser.get(f'{address}/{page}')
        found = browser.execute_async_script(LOOK, width) + complaints(browser, address)
        if found: wrong[page] = found
    assert not wrong, json.dumps(wrong, indent=1)


def test_search_finds(address: str, browser) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait
    resize(browser, 1440)
    browser.get(f'{address}/search.html?q=kernel')
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, '#search-results li a'))
    assert not complaints(browser, address)


def test_dark_mode_and_copy_buttons(address: str, browser) -> None:
    from selenium.webdriver.common.by import By
    resize(browser, 1440)
    browser.get(f'{address}/core.html')
    background = "return getComputedStyle(document.body).backgroundColor"
    colours = []
    for theme in ('light', 'dark'):
        browser.execute_script(f"document.body.dataset.theme = '{theme}'")
        colours.append(browser.execute_script(background))
    assert colours[0] != colours[1]
    assert browser.find_elements(By.CSS_SELECTOR, 'div.highlight button.copybtn')
