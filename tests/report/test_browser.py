"""The page in a real browser: nothing is fetched or logged, zoom and hover work. Screenshots land in tmp_path."""

import json
import shutil
import time

import pytest
from fake_runs import CIFAR10, make_run

from lowbit.report import compare

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH (`apt install chromium`)")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = "<script>alert(1)</script><b>bold</b><img src=x onerror=alert(2)>"
CURVES = ("learning_rate", "train_loss", "test_loss", "test_accuracy")


def wait_until(page, condition, seconds=60):
    """Poll from outside: the page's policy forbids the `eval` that Playwright's own waiting uses."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"not reached: {condition}"
        page.wait_for_timeout(50)


def hover(page, chart, across=0.5):
    """Move the mouse over a chart, as a hand does: in several steps, once the page stands still."""
    area = page.locator(f"#{chart} .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + (across - 0.1) * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.move(box["x"] + across * box["width"], box["y"] + 0.5 * box["height"], steps=5)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; when the test ends, fails if the page fetched or logged anything."""
    complaints, pages = [], []

    def opened(path, **options):
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        page.set_default_timeout(120_000)
        pages.append(page)
        page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requested(request.url))
        page.goto(path.as_uri())
        wait_until(page, "[...document.querySelectorAll('.chart')].every(e => e.querySelector('.main-svg'))")
        return page

    def requested(url):
        if not url.startswith(("file:", "data:", "blob:")):
            complaints.append(f"request: {url}")

    yield opened
    for page in pages:
        page.close()
    assert complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_run(folder / "vgg16-float", method="float", accuracy=0.90, packed_bytes=58_890_000, milliseconds=20.1),
        make_run(folder / "vgg16-xnor", accuracy=0.79, layers=6, packed_bytes=2_108_744, milliseconds=1.2),
        make_run(folder / "vgg16-bnn", method="bnn", accuracy=0.77, finished=6, evaluated=False),
    ]
    return compare(runs, folder / "report.html", title="VGG16 on CIFAR-10")


def x_range(page, chart):
    return page.evaluate("id => document.getElementById(id)._fullLayout.xaxis.range", chart)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_light_and_dark_and_on_a_phone(open_page, report, tmp_path, scheme, width):
    page = open_page(report, viewport={"width": width, "height": 850}, color_scheme=scheme)
    page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lefts = {round(page.locator(f"#{chart}").bounding_box()["x"]) for chart in CURVES}
    assert len(lefts) == (1 if width == 390 else 2)
    for chart in ("packed_bytes", "milliseconds"):
        line, _, front = page.evaluate(f"document.getElementById('{chart}').data")
        assert front["text"] == ["vgg16-xnor", "vgg16-float"]
        assert line["x"] == front["x"]
        assert front["y"][0] < front["y"][1]


def test_a_zoom_goes_to_all_curves_and_a_double_click_back(open_page, report):
    page = open_page(report)
    before = x_range(page, "test_loss")
    page.locator("#train_loss .nsewdrag").scroll_into_view_if_needed()
    box = page.locator("#train_loss .nsewdrag").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.3 * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], y, steps=5)
    page.mouse.up()
    wait_until(page, "document.getElementById('test_loss')._fullLayout.xaxis.range[0] > 2")
    wait_until(page, "document.getElementById('learning_rate')._fullLayout.xaxis.range[0] > 2")
    zoomed = [x_range(page, chart) for chart in CURVES]
    assert all(part == pytest.approx(zoomed[0]) for part in zoomed)
    assert before[0] < zoomed[0][0] < zoomed[0][1] < before[1]
    page.locator("#test_loss .nsewdrag").dblclick()
    wait_until(page, "document.getElementById('train_loss')._fullLayout.xaxis.range[0] < 2")


def test_hover_shows_the_values_of_all_runs(open_page, report):
    page = open_page(report)
    hover(page, "test_accuracy")
    for chart in CURVES:
        page.wait_for_selector(f"#{chart} .hoverlayer .legend", state="attached")
    shown = page.locator("#test_accuracy .hoverlayer").text_content()
    assert "Epoch" in shown
    assert all(name in shown for name in ("vgg16-float: ", "vgg16-xnor: ", "vgg16-bnn: ", " %"))
    hover(page, "test_accuracy", 0.86)
    wait_until(page, "document.querySelector('#test_accuracy .hoverlayer').textContent.includes('Epoch 9')")
    shown = page.locator("#test_accuracy .hoverlayer").text_content()
    assert "vgg16-xnor: " in shown
    assert "vgg16-bnn" not in shown, "the run ended at epoch 6"


def test_hover_names_the_best_epochs_there_and_nowhere_else(open_page, report):
    page = open_page(report)
    data = "document.getElementById('test_accuracy').data"
    for run in range(3):
        notes = page.evaluate(f"{data}[{run}].customdata.map(entry => entry[1])")
        assert "".join(notes).count("validation") == 1
        assert "".join(notes).count("test") == 1


def test_the_best_epochs_are_marked_apart(open_page, report):
    page = open_page(report)
    symbols = page.evaluate("document.getElementById('test_accuracy').data.map(trace => trace.marker.symbol)")
    assert symbols.count("star") == symbols.count("diamond-open") == 3


def test_a_click_on_a_name_hides_its_run(open_page, report):
    page = open_page(report)
    page.locator("#legend button").first.click()
    assert page.evaluate("document.getElementById('train_loss').data.length") == 2


def test_matrices_switch_between_shares_and_images(open_page, report):
    page = open_page(report)
    cell = "document.getElementById('matrix-0').data[0].z[0][0]"
    assert 0 < page.evaluate(cell) <= 1
    page.get_by_role("button", name="Images", exact=True).click()
    assert page.evaluate(cell) > 100
    assert "of 1000 images" in page.evaluate("document.getElementById('matrix-0').data[0].customdata[0][0]")


def test_classes_that_lose_most_are_on_top(open_page, report):
    page = open_page(report)
    for score, column in (("Precision", 0), ("Recall", 1), ("F1", 2)):
        page.get_by_role("button", name=score, exact=True).click()
        cells = page.locator(f"#scores-table td:nth-child({column + 3}) .change").all_text_contents()
        changes = [float(text.replace("\u2212", "-")) for text in cells]
        assert len(changes) == 10
        assert changes == sorted(changes)
    page.locator("#first").select_option(label="vgg16-xnor")
    page.locator("#difference .empty").wait_for()
    page.locator("#second").select_option(label="vgg16-float")
    page.locator("#difference .main-svg").first.wait_for()


def test_colours_follow_the_system(open_page, report):
    page = open_page(report, color_scheme="light")
    colour = "document.getElementById('test_loss').data[0].line.color"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"{colour} !== '{light}'")


@pytest.fixture
def diagnosed(open_page, tmp_path):
    runs = [make_run(tmp_path / "plain"), *(make_run(tmp_path / f"run-{n}", epochs=n, layers=n) for n in (3, 13))]
    return open_page(compare(runs, tmp_path / "report.html"))


def traces(page, chart, what):
    return page.evaluate(f"document.getElementById('{chart}').data.map(trace => {what})")


def test_each_quantized_layer_has_its_line(diagnosed):
    page = diagnosed
    assert page.locator("#diagnosed option").all_text_contents() == ["run-3", "run-13"]
    assert traces(page, "gradient_cosine", "trace.y.length") == [3] * 3
    page.locator("#diagnosed").select_option(label="run-13")
    names = page.locator("#layers button").all_text_contents()
    assert names == [f"features.{layer}.conv" for layer in range(13)]
    assert page.locator("#latent-layer option").all_text_contents() == names
    for chart in ("flips", "gradient_cosine", "saturated", "dead"):
        assert traces(page, chart, "trace.y.length") == [13] * 13
    assert len(set(traces(page, "flips", "trace.line.color"))) == 13
    assert traces(page, "saturated", "trace.y[0]")[0] is None, "the first layer has no activation quantizer"
    assert traces(page, "dead", "trace.y[12]")[1] == pytest.approx(5)
    page.locator("#layers button").first.click()
    assert len(traces(page, "dead", "0")) == 12


def test_flips_per_epoch_or_per_step(diagnosed):
    page = diagnosed
    before = traces(page, "flips", "trace.y[0]")
    page.get_by_role("button", name="per step", exact=True).click()
    assert traces(page, "flips", "trace.y[0]") == pytest.approx([flips / 60 for flips in before])
    assert "in one step" in page.locator("#flips-against").text_content()


def test_the_slider_goes_through_the_epochs_of_a_layer(diagnosed):
    page = diagnosed
    page.locator("#diagnosed").select_option(label="run-13")
    assert page.locator("#latent-shown").text_content() == "13"
    assert page.locator("#latent-first").text_content() == "dashed: epoch 1"
    widest = traces(page, "latent_weights", "Math.max(...trace.x)")
    assert widest[0] > widest[1], "weights spread during training"
    area = traces(page, "latent_weights", "trace.y.reduce((sum, y, i) => sum + y * (trace.width ?? [])[i], 0)")[0]
    assert area == pytest.approx(1)
    page.locator("#latent-epoch").focus()
    page.keyboard.press("Home")
    assert page.locator("#latent-shown").text_content() == "1"
    assert len(traces(page, "latent_weights", "0")) == 1
    page.locator("#latent-layer").select_option(label="features.12.conv")
    assert page.locator("#latent-shown").text_content() == "1"


def test_a_zoom_goes_to_all_charts_of_the_layers_and_no_other(diagnosed):
    page = diagnosed
    area = page.locator("#saturated .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 60, steps=5)
    page.mouse.up()
    wait_until(page, "document.getElementById('dead')._fullLayout.xaxis.range[0] > 1.3")
    assert x_range(page, "flips") == pytest.approx(x_range(page, "saturated"))
    assert x_range(page, "train_loss")[0] < 1


def test_colours_of_layers_follow_the_system(diagnosed):
    page = diagnosed
    page.emulate_media(color_scheme="light")
    colour = "document.getElementById('flips').data[0].line.color"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    wait_until(page, f"{colour} !== '{light}'")
    assert page.locator("#layers .swatch").first.evaluate("e => e.style.color").replace(" ", "") == page.evaluate(
        colour
    )


def test_hostile_names_stay_text(open_page, tmp_path):
    classes = [HOSTILE, *CIFAR10[1:]]
    folder = tmp_path / HOSTILE.replace("/", "\u2215")
    runs = [make_run(folder, classes=classes), make_run(tmp_path / "b", method="float", classes=classes, layers=3)]
    written = runs[1].diagnostics_path.read_text().replace("features", json.dumps(HOSTILE)[1:-1])
    runs[1].diagnostics_path.write_text(written)
    page = open_page(compare(runs, tmp_path / "report.html", title=HOSTILE))
    hover(page, "test_accuracy")
    page.wait_for_selector("#test_accuracy .hoverlayer .legend", state="attached")
    assert "<script>alert(1)" in page.locator("#test_accuracy .hoverlayer").text_content()
    hover(page, "matrix-0")
    page.wait_for_selector("#matrix-0 .hoverlayer .hovertext", state="attached")
    assert "<script>alert" in page.locator("#matrix-0").text_content()
    page.evaluate("Plotly.Fx.hover('dead', [{curveNumber: 1, pointNumber: 2}])")
    assert HOSTILE in page.locator("#dead .hoverlayer").text_content()
    assert HOSTILE in page.locator("#layers button").first.text_content()
    assert page.locator("main img, main b, main script").count() == 0


def odd_runs(case, folder):
    if case == "one":
        return [make_run(folder / "a")]
    if case == "none evaluated":
        return [make_run(folder / "a", evaluated=False, finished=0), make_run(folder / "b", evaluated=False)]
    if case == "other classes":
        return [make_run(folder / "a"), make_run(folder / "b", classes=["x", "y", "z"])]
    classes = [f"class {k}" for k in range(30)]
    return [make_run(folder / f"{i}", accuracy=0.6 + i / 40, images=500, classes=classes) for i in range(9)]


@pytest.mark.parametrize("case", ["one", "none evaluated", "other classes", "nine with thirty classes"])
def test_odd_sets_of_runs(open_page, tmp_path, case):
    runs = odd_runs(case, tmp_path)
    page = open_page(compare(runs, tmp_path / "report.html"))
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.locator("#matrices figure").count() == sum(run.evaluation is not None for run in runs)
