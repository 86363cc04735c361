"""Facts about the studio's page that a person relies on, in a real browser against a real server.

Needs Chromium (``chromium`` on the path), which ``.ci/run`` installs.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright_api = pytest.importorskip("playwright.sync_api")

from lowmem_imagic.demo.render import render  # noqa: E402
from lowmem_imagic.demo.scene import Scene  # noqa: E402
from lowmem_imagic.edits import file as edit_file  # noqa: E402
from lowmem_imagic.ui.guard import COOKIE  # noqa: E402
from lowmem_imagic.ui.visitors import Visitors, digest_of  # noqa: E402
from tests.studio_server import served  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    # The browser's own pipes are closed when Python collects them.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PATIENCE_MS = 400_000
"""Only a hang fails: a busy machine may be slow."""
_SLOW_TO_CLOSE = """
const quick = window.fetch;
window.fetch = async (...request) => {
  const answer = await quick(...request);
  if (!answer.url.includes("/queue/data")) return answer;
  const slow = new TransformStream({
    async transform(chunk, controller) {
      const text = new TextDecoder().decode(chunk);
      const at = text.includes('"close_stream"') ? text.lastIndexOf("data:") : -1;
      const end = at < 0 ? chunk.length : chunk.length - (text.length - at);
      controller.enqueue(chunk.slice(0, end));
      if (at < 0) return;
      window.lateCloses = (window.lateCloses || 0) + 1;
      await new Promise((done) => setTimeout(done, 1500));
      controller.enqueue(chunk.slice(end));
    },
  });
  return new Response(answer.body.pipeThrough(slow), answer);
};
"""
"""Script by which a browser reads late that a stream of answers is closed."""
_SCENES = ("a red cube on a wooden floor", "a green sphere on a wooden floor", "a blue cone on a grass floor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the studio is started in, with some photos."""
    folder = tmp_path_factory.mktemp("studio")
    for number, sentence in enumerate(_SCENES):
        render(Scene.from_sentence(sentence, seed=3), 96).save(folder / f"photo-{number}.png")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tiny_folder: Path) -> Iterator[str]:
    """The address of a studio that all tests share; its first base is a tiny one, whose quality matters to none."""
    with served(folder, "--model", str(tiny_folder)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser."""
    with playwright_api.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


class Visit:
    """One person's browser at the studio, and the acts of a person."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(_PATIENCE_MS)
        self.address = address
        self.elsewhere: list[str] = []
        """Requests that left the studio."""
        self.errors: list[str] = []
        self.context.on("request", self._note)
        self.page = self.open()

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def open(self) -> Any:
        """A new tab."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.address)
        page.wait_for_function("document.querySelector('#queue')?.innerText.includes('the card')")
        return page

    def choose_photo(self, path: Path, page: Any = None) -> None:
        """Uploads a photo, and waits until it is shown."""
        page = page or self.page
        page.set_input_files("#photo-file input[type=file]", path)
        page.locator(f"#photo img[alt='the photo {path.name}']").wait_for()

    def quick(self, *, embed: int = 2, finetune: int = 3) -> None:
        """Chooses a training of few steps, and pictures of few."""
        self.page.locator("#field-preset").get_by_role("radio", name="fast").check()
        if not self.page.locator("#field-steps-sample textarea, #field-steps-sample input").is_visible():
            self.page.get_by_role("button", name="More for pictures").click()
        self.page.locator("#field-steps-sample textarea, #field-steps-sample input").fill("3")
        if not self.page.locator("#field-steps-embed textarea, #field-steps-embed input").is_visible():
            self.page.get_by_role("button", name="More for training").click()
        # With a sentence, the base need not describe the photo.
        self.page.locator("#train-sentences textarea").fill("a red cube on a wooden floor")
        self.page.locator("#field-steps-embed textarea, #field-steps-embed input").fill(str(embed))
        self.page.locator("#field-steps-finetune textarea, #field-steps-finetune input").fill(str(finetune))

    def train(self) -> None:
        """Trains, and waits for the picture at eta 0."""
        self.page.locator("#train:enabled").click()
        self.page.locator("#viewer .row button[data-eta='0'], #message [role=alert]").first.wait_for()
        assert not self.page.locator("#message [role=alert]").all_inner_texts()

    def ask(self, sentence: str) -> None:
        """Asks a sentence, and waits for its whole row."""
        self.page.locator("#sentence textarea, #sentence input").first.fill(sentence)
        self.page.locator("#ask:enabled").click()
        self.page.wait_for_function(
            "words => document.querySelector('#viewer .now')?.innerText.startsWith(words)", arg=sentence
        )
        self.page.locator("#ask:enabled").wait_for()

    def etas(self) -> list[str]:
        """The etas of the row of pictures."""
        return [str(one.get_attribute("data-eta")) for one in self.page.locator("#viewer .row button").all()]

    def slide(self, eta: str) -> None:
        """Moves the slider along eta without letting go."""
        self.page.locator("#eta input[type=range]").evaluate(
            "(slider, eta) => { slider.value = eta; slider.dispatchEvent(new Event('input', {bubbles: true})); }", eta
        )

    def point(self, share: float) -> float:
        """Moves the mouse to a share of the width of the slider along eta; the slider's value."""
        slider = self.page.locator("#eta input[type=range]")
        slider.scroll_into_view_if_needed()
        box = slider.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)
        return float(slider.input_value())

    def download(self, label: str, path: Path) -> Path:
        """Downloads what a link leads to."""
        with self.page.expect_download() as started:
            self.page.locator("#downloads a", has_text=label).first.click()
        started.value.save_as(path)
        return path

    def open_edit(self, path: Path) -> None:
        """Opens an edit file made for the tiny base, and waits for the picture at eta 0."""
        page = self.page
        self.tab("Edits")
        page.set_input_files("#edit-file input[type=file]", path)
        page.get_by_text("made for tiny-sd: choose a base below").wait_for()
        page.locator("#edit-open:enabled").click()
        page.get_by_text("choose a base; the file was made for tiny-sd").wait_for()
        page.locator("#edit-base input").click()
        page.get_by_role("option", name="tiny-sd").click()
        page.locator("#edit-open:enabled").click()
        page.get_by_text("opened: ask it").wait_for()
        self.tab("Studio")
        page.locator("#viewer .row button[data-eta='0']").wait_for()

    def tab(self, name: str) -> None:
        """Chooses a tab of the page."""
        self.page.get_by_role("tab", name=name).click()

    def unanswered(self, *acts: Callable[[], None]) -> None:
        """Does acts before the page gets an answer to the first of them."""
        held: list[Any] = []
        self.page.route("**/queue/join*", lambda route: held.append(route))
        for act in acts:
            act()
            # Keys that are pressed within 0.6 s are one way to an eta.
            self.page.wait_for_timeout(1000)
        assert held
        while held:
            held.pop(0).continue_()
            # Nobody acts so fast that one request overtakes another.
            self.page.wait_for_timeout(100)
        self.page.unroute("**/queue/join*")

    def close(self) -> None:
        """Closes the browser; all its requests went to the studio, and no script failed."""
        self.context.close()
        assert not self.elsewhere
        assert not self.errors


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    """A person who comes for the first time."""
    visit = Visit(browser, address)
    yield visit
    visit.close()


@pytest.fixture(scope="module")
def edit(browser: Any, address: str, folder: Path) -> Path:
    """An edit file that a person trained and saved."""
    visit = Visit(browser, address)
    visit.choose_photo(folder / "photo-0.png")
    visit.quick()
    visit.train()
    path = visit.download("edit file", folder / "saved.safetensors")
    visit.close()
    return path


def test_a_photo_is_trained_once_and_asked_twice(visit, folder):
    """From a photo to downloads on the bundled base: one training, two sentences, the slider, finer steps, a sheet,
    history."""
    page = visit.page
    page.locator("#model input").click()
    page.get_by_role("option", name="demo").click()
    visit.choose_photo(folder / "photo-0.png")
    page.wait_for_function(
        "/fits: .* of 8 GB, about \\d+ (s|min), 96 x 96 px/.test(document.querySelector('#plan')?.innerText)"
    )
    assert "96 x 96 px, edited at 128 x 128" in page.inner_text("#plan")
    visit.quick()
    visit.train()
    page.wait_for_function("document.querySelector('#plan').innerText.includes(', as last time')")
    visit.ask("a blue cube on a wooden floor")
    first = visit.etas()
    assert first == ["0", "0.6", "0.8", "1", "1.2"]

    # Without a request the slider shows the nearest picture; let go, it renders its own eta.
    before = page.locator("#viewer .after").get_attribute("src")
    visit.slide("0.65")
    assert page.locator("#viewer .now output").inner_text() == "0.6"
    assert page.locator("#viewer .after").get_attribute("src") != before
    page.click("#finer")
    page.locator("#viewer .row button[data-eta='0.65']").wait_for()
    page.wait_for_function("document.querySelector('#viewer .now output').innerText === '0.65'")

    # By mouse: each move shows the nearest picture, only letting go renders one.
    row, output = visit.etas(), page.locator("#viewer .now output")
    visit.point(0.7)
    page.mouse.down()
    for share in (0.6, 0.1, 0.3, 0.5):
        eta = visit.point(share)
        assert output.inner_text() in sorted(row, key=lambda one: abs(float(one) - eta))[:2]
        assert visit.etas() == row
    page.mouse.up()
    page.locator(f"#viewer .row button[data-eta='{eta:g}']").wait_for()
    page.locator("#ask:enabled").wait_for()
    # By keyboard: the same.
    page.locator("#eta input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    moved = float(page.locator("#eta input[type=range]").input_value())
    assert moved > eta and f"{moved:g}" not in row
    page.locator(f"#viewer .row button[data-eta='{moved:g}']").wait_for()
    page.locator("#ask:enabled").wait_for()

    page.locator("#viewer .cut input").focus()
    page.keyboard.press("ArrowRight")
    assert "--cut: 1%" in str(page.locator("#viewer .compare").get_attribute("style"))

    evil = "a <b>red</b> cube ${1+1} {{2}}"
    visit.ask(evil)
    assert page.locator("#viewer .now b").count() == 0
    page.locator("#sheet").click()
    sheet = visit.download("sheet", folder / "sheet.png")
    picture = visit.download("eta 1.2", folder / "picture.png")
    for path in (sheet, picture):
        with Image.open(path) as image:
            assert "compositeWithTrainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
    with Image.open(picture) as image:
        assert image.size == (96, 96) and evil in image.info["parameters"]

    page.locator("#history input").click()
    page.get_by_role("option", name="a blue cube on a wooden floor").click()
    page.wait_for_function("document.querySelector('#viewer .now').innerText.startsWith('a blue cube')")
    assert "0.65" in visit.etas()


def test_a_training_survives_reload_and_stop(visit, folder):
    """A reload and a second tab show the running training; a stop saves it, and it goes on where it was."""
    page = visit.page
    visit.choose_photo(folder / "photo-1.png")
    visit.quick(embed=400, finetune=3)
    page.locator("#train:enabled").click()
    page.get_by_text(re.compile("stage 1 of 2: embedding: [1-9]")).wait_for()
    page.reload()
    page.get_by_role("progressbar").wait_for()
    second = visit.open()
    second.get_by_role("progressbar").wait_for()
    # Another photo in the second tab does not disturb the first one.
    visit.choose_photo(folder / "photo-2.png", second)
    assert page.locator("#photo img[alt='the photo photo-1.png']").count() == 1
    page.locator("#stop:enabled").click()
    page.get_by_text("stopped; the training is saved").wait_for()
    # A tab behind another one draws once a second, and would lose what is typed before that.
    page.bring_to_front()
    # Only texts outlive a reload.
    visit.quick(embed=400, finetune=3)
    page.locator("#train:enabled").click()
    words = page.get_by_text(re.compile("stage 1 of 2: embedding: [1-9]"))
    words.wait_for()
    assert int(re.fullmatch(r".*embedding: (\d+) of 400\b.*", words.inner_text())[1]) > 1
    page.locator("#stop:enabled").click()
    page.get_by_text("stopped; the training is saved").wait_for()


def test_an_eta_let_go_while_the_card_is_at_work_is_rendered_after_it(visit, folder):
    """Of the etas let go meanwhile the page says that the last one waits, and renders this one alone."""
    page = visit.page
    visit.choose_photo(folder / "photo-0.png")
    visit.quick()
    visit.train()
    visit.ask("a blue cube on a wooden floor")
    row = visit.etas()
    # Another photo keeps the card at work.
    visit.page = other = visit.open()
    visit.choose_photo(folder / "photo-1.png")
    visit.quick(embed=4000)
    other.locator("#train:enabled").click()
    other.get_by_text(re.compile("stage 1 of 2: embedding: [1-9]")).wait_for()
    visit.page = page
    page.bring_to_front()
    etas = []
    for share, words in ((0.15, "waiting for the card: 1 job"), (0.3, "waits"), (0.45, "waits")):
        visit.point(0.7)
        page.mouse.down()
        etas.append(f"{visit.point(share):g}")
        page.mouse.up()
        page.get_by_text(f"eta {etas[-1]} waits for the card" if words == "waits" else words).wait_for()
    assert not set(etas) & set(row)
    other.bring_to_front()
    other.locator("#stop:enabled").click()
    page.bring_to_front()
    page.locator(f"#viewer .row button[data-eta='{etas[2]}']").wait_for()
    page.locator("#ask:enabled").wait_for()
    assert set(visit.etas()) == {*row, etas[0], etas[2]}


def test_a_choice_made_before_the_answer_to_the_last_one_counts(visit, folder):
    """On a slow connection the eta that is let go last is rendered, and the sentence chosen last is shown."""
    page = visit.page
    visit.choose_photo(folder / "photo-0.png")
    visit.quick()
    visit.train()
    sentences = [f"a {colour} cube on a wooden floor" for colour in ("blue", "green", "yellow")]
    for sentence in sentences:
        visit.ask(sentence)
    row = visit.etas()

    def press() -> None:
        page.locator("#eta input[type=range]").focus()
        page.keyboard.press("ArrowRight")

    def choose(sentence: str) -> Callable[[], None]:
        def chosen() -> None:
            page.locator("#history input").click()
            page.get_by_role("option", name=sentence).click()

        return chosen

    visit.point(0.5)
    page.mouse.down()
    page.mouse.up()
    page.locator("#viewer .row button[data-eta='0.75']").wait_for()
    page.locator("#ask:enabled").wait_for()
    visit.unanswered(press, press, press)
    page.locator("#viewer .row button[data-eta='0.9']").wait_for()
    page.locator("#ask:enabled").wait_for()
    assert set(visit.etas()) >= {*row, "0.75", "0.9"}

    shown = "words => document.querySelector('#viewer .now').innerText.startsWith(words)"
    visit.unanswered(choose(sentences[0]), choose(sentences[1]))
    page.wait_for_function(shown, arg=sentences[1])
    # Back to the one that is still shown is a choice, too.
    visit.unanswered(choose(sentences[0]), choose(sentences[1]))
    page.locator("#ask:enabled").wait_for()
    page.wait_for_timeout(3000)
    assert page.evaluate(shown, sentences[1])


def test_the_page_goes_on_when_its_stream_of_answers_is_closed_late(visit, folder):
    """An event that is sent before the browser reads that the stream of answers is closed gets its answer all the same,
    so that the page shows the end of a training."""
    visit.context.add_init_script(_SLOW_TO_CLOSE)
    visit.page = page = visit.open()
    visit.choose_photo(folder / "photo-0.png")
    visit.quick()
    visit.train()
    assert page.evaluate("window.lateCloses") > 0


def test_a_saved_edit_opens_on_another_machine(visit, edit):
    """An edit file dropped into another person's page asks for its base, then answers sentences."""
    visit.open_edit(edit)
    visit.ask("a red cube on a grass floor")
    assert "1" in visit.etas()


def test_a_recorded_source_prompt_is_in_its_field_and_can_be_emptied(visit, edit, folder):
    """The page shows what an edit says its photo shows; left so it renders the pictures, emptied it does not."""
    recorded = edit_file.read(edit)
    settings = {**recorded.settings, "sample": {**recorded.settings["sample"], "source_prompt": "a red cube"}}
    edit_file.write(replace(recorded, settings=settings), folder / "told.safetensors")
    visit.open_edit(folder / "told.safetensors")
    visit.page.get_by_role("button", name="More for pictures").click()
    field = visit.page.locator("#field-source textarea, #field-source input")
    playwright_api.expect(field).to_have_value("a red cube")
    texts = []
    for typed in (None, ""):
        if typed is not None:
            field.fill(typed)
        visit.ask("a red cube on a grass floor")
        texts.append(Image.open(visit.download("eta 1", folder / "asked.png")).text["parameters"])
    assert ["Imagic source: a red cube" in text for text in texts] == [True, False], texts
    assert visit.page.locator("#history input").input_value() == "a red cube on a grass floor (no source)"
    # A photo has no such text.
    visit.choose_photo(folder / "photo-0.png")
    playwright_api.expect(field).to_have_value("")


def test_nobody_sees_the_files_of_another(visit, browser, address, folder):
    """A picture's address works in the browser it was made for, and in no other."""
    visit.choose_photo(folder / "photo-0.png")
    source = visit.page.locator("#photo img").get_attribute("src")
    assert visit.context.request.get(f"{address}{source[1:]}").status == 200
    other = Visit(browser, address)
    assert other.page.locator("#photo img").count() == 0
    assert other.context.request.get(f"{address}{source[1:]}").status == 404
    other.close()


@pytest.mark.parametrize(
    ("place", "button", "data", "words"),
    [
        ("#photo-file", "#message", b"not a picture", "is a text file"),
        ("#photo-file", "#message", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "notes.png"),
        ("#edit-file", "#edits-message", b"\xff" * 100, "notes.png"),
    ],
    ids=["text", "damaged", "edit"],
)
def test_a_bad_file_is_one_line(visit, place, button, data, words):
    """A file that is no photo, or no edit, is refused in one line that names it, without a path of the server."""
    if place == "#edit-file":
        visit.tab("Edits")
    upload = {"name": "notes.png", "mimeType": "application/octet-stream", "buffer": data}
    visit.page.set_input_files(f"{place} input[type=file]", files=[upload])
    alert = visit.page.locator(f"{button} [role=alert]")
    alert.wait_for()
    text = alert.inner_text()
    assert words in text and "\n" not in text.strip() and "/tmp" not in text and "Traceback" not in text


def test_a_batch_lives_when_the_browser_is_closed(browser, address, folder):
    """Three photos go through the batch queue while nobody looks; stop, continue, the overview page, one archive."""
    visit = Visit(browser, address)
    visit.tab("Many")
    page = visit.page
    page.set_input_files("#batch-files input[type=file]", [folder / f"photo-{number}.png" for number in range(3)])
    page.get_by_text("photo-2").first.wait_for()
    page.locator("#batch-sentences textarea").fill("a red cube on a wooden floor")
    page.locator("#batch-preset").get_by_role("radio", name="fast").check()
    page.get_by_role("button", name="More for batches").click()
    page.locator("#batch-steps-embed textarea, #batch-steps-embed input").fill("60")
    page.locator("#batch-steps-finetune textarea, #batch-steps-finetune input").fill("2")
    page.locator("#batch-begin").click()
    page.get_by_text("3 items").wait_for()
    page.locator("#batch-stop:enabled").click()
    page.get_by_text("“Continue” goes on with it").wait_for()
    page.locator("#batch-continue:enabled").click()
    page.locator("#batch-status").get_by_role("progressbar").wait_for()
    cookies = visit.context.cookies()
    visit.close()

    again = Visit(browser, address)
    again.context.add_cookies(cookies)
    page = again.page
    page.reload()
    again.tab("Many")
    page.get_by_text("3 items: 3 done").wait_for()
    # Its photos are deleted.
    playwright_api.expect(page.locator("#batch-continue")).to_be_disabled()
    with again.context.expect_page() as opened:
        page.get_by_role("link", name="overview page").click()
    overview = opened.value
    overview.wait_for_load_state()
    assert overview.locator("article").count() == 3
    overview.wait_for_function("[...document.images].filter(one => one.complete && one.naturalWidth).length >= 3")
    page.locator("#batch-pack").click()
    with page.expect_download() as started:
        page.get_by_role("link", name="all results in one file").click()
    assert started.value.suggested_filename == "batch-001.zip"
    again.close()
    kept = list((folder / "studio").glob("*/batch-*"))
    assert kept and not [path for path in kept if (path / "photos").exists()]


def test_an_act_is_for_the_batch_that_the_page_shows(visit, address, folder):
    """A batch that was removed in another tab takes no other one with it, nor does a second click on "Remove"."""
    cookie = Visitors.new_cookie()
    batches = folder / "studio" / digest_of(cookie)
    for number in (1, 2, 3):
        (batches / f"batch-00{number}").mkdir(parents=True)
    visit.context.add_cookies([{"name": COOKIE, "value": cookie, "url": address}])
    second = visit.page
    second.reload()
    first = visit.open()
    for page in (second, first):
        page.get_by_role("tab", name="Many").click()
        page.wait_for_function("document.querySelector('#batch input')?.value === 'batch-003'")
        page.locator("#batch-remove:enabled").wait_for()

    def removed_elsewhere() -> None:
        first.bring_to_front()
        first.locator("#batch-remove").click()
        first.locator("#batch-remove:disabled").wait_for()
        assert not (batches / "batch-003").exists()
        second.bring_to_front()

    visit.unanswered(removed_elsewhere, second.locator("#batch-remove").click)
    second.get_by_text("batch-003 is gone: it was removed in another tab").wait_for()
    second.locator("#batch-remove:disabled").wait_for()
    assert sorted(path.name for path in batches.iterdir()) == ["batch-001", "batch-002"]

    # Nor does a new batch get the name of a removed one.
    visit.page = first
    first.bring_to_front()
    first.set_input_files("#batch-files input[type=file]", folder / "photo-0.png")
    first.locator("#batch-files").get_by_text("photo-0").first.wait_for()
    first.locator("#batch-sentences textarea").fill("a red cube on a wooden floor")
    first.locator("#batch-begin").click()
    first.wait_for_function("document.querySelector('#batch input')?.value === 'batch-004'")
    first.locator("#batch-stop:enabled").click()
    first.get_by_text("“Continue” goes on with it").wait_for()


def test_what_was_typed_outlives_a_lost_connection(visit, folder):
    """After a lost connection the page loads itself again, with the photo and with what was typed."""
    page = visit.page
    visit.choose_photo(folder / "photo-0.png")
    visit.quick()
    visit.tab("Many")
    page.locator("#batch-sentences textarea").fill("a blue cube on a grass floor\na cone")
    visit.tab("Studio")
    page.evaluate("window.before = true")
    page.route("**/queue/join*", lambda route: route.abort())
    page.wait_for_function("!window.before")
    page.unroute("**/queue/join*")
    page.locator("#photo img[alt='the photo photo-0.png']").wait_for()
    page.get_by_role("button", name="More for training").click()
    page.wait_for_function(
        "words => document.querySelector('#train-sentences textarea')?.value === words",
        arg="a red cube on a wooden floor",
    )
    visit.tab("Many")
    page.wait_for_function("document.querySelector('#batch-sentences textarea').value.endsWith('\\na cone')")
    # The server gets it, too.
    page.set_input_files("#batch-files input[type=file]", folder / "photo-0.png")
    page.locator("#batch-files").get_by_text("photo-0").first.wait_for()
    page.locator("#batch-begin").click()
    page.locator("#batch-status").get_by_text("2 items").wait_for()
    page.locator("#batch-stop:enabled").click()
    page.get_by_text("“Continue” goes on with it").wait_for()


def test_the_plan_is_for_the_photo_that_is_shown(visit, folder, tmp_path):
    """A photo that is shown again has its own plan, which follows all fields; a removed one makes room for another."""
    page = visit.page
    words = "words => document.querySelector('#plan')?.innerText.includes(words)"
    visit.choose_photo(folder / "photo-0.png")
    page.wait_for_function(words, arg="96 x 96 px, edited at")
    Image.new("RGB", (60, 90), "teal").save(tmp_path / "tall.png")
    visit.choose_photo(tmp_path / "tall.png")
    page.wait_for_function(words, arg="60 x 90 px, edited at")
    page.locator("#projects input").click()
    page.get_by_role("option", name="photo-0.png").click()
    page.wait_for_function(words, arg="96 x 96 px, edited at")
    page.get_by_role("button", name="More for training").click()
    for rank, told in (("four", "“LoRA rank” is 'four'"), ("4", "96 x 96 px, edited at")):
        page.locator("#field-rank textarea, #field-rank input").fill(rank)
        page.locator("#train-sentences textarea").focus()
        page.wait_for_function(words, arg=told)
    page.locator("#remove-project:enabled").click()
    page.locator("#photo img[alt='the photo tall.png']").wait_for()
    page.locator("#remove-project:enabled").click()
    page.get_by_text("No photo yet.").wait_for()
    playwright_api.expect(page.locator("#remove-project")).to_be_disabled()


def test_a_folder_of_photos_becomes_a_batch(visit, folder, tmp_path):
    """A chosen folder gives its photos to a batch, those of folders in it, too; its other files are left out.

    A batch that does not begin leaves the photos in their box."""
    chosen = tmp_path / "album"
    (chosen / "deeper").mkdir(parents=True)
    shutil.copy(folder / "photo-0.png", chosen / "first.png")
    shutil.copy(folder / "photo-1.png", chosen / "deeper" / "second.png")
    (chosen / "notes.txt").write_text("no photo")
    page = visit.page
    visit.tab("Many")
    with page.expect_file_chooser() as chooser:
        page.locator("#batch-folder").click()
    chooser.value.set_files(chosen)
    files = page.locator("#batch-files")
    for name in ("first", "second"):
        files.get_by_text(name).first.wait_for()
    assert files.get_by_text("notes").count() == 0
    page.locator("#batch-begin").click()
    page.get_by_text("a batch needs one photo or more, and one sentence or more").wait_for()
    # What would empty the box comes after the message.
    page.wait_for_timeout(1000)
    assert files.get_by_text("first").count()
    page.locator("#batch-sentences textarea").fill("a red cube on a wooden floor")
    page.locator("#batch-begin").click()
    page.locator("#batch-status").get_by_text("2 items").wait_for()
    page.locator("#batch-stop:enabled").click()
    page.get_by_text("“Continue” goes on with it").wait_for()


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_fits_and_every_control_has_a_name(browser, address, edit, width, colours):
    """At 400 and 1600 px nothing is cut off, and every control has a name for a screen reader, in light and in dark."""
    visit = Visit(browser, address, viewport={"width": width, "height": 900}, color_scheme=colours)
    for name in ("Studio", "Edits", "Many"):
        visit.tab(name) if width > 500 else visit.page.evaluate(
            "name => [...document.querySelectorAll('[role=tab]')].find(one => one.innerText.trim() === name).click()",
            name,
        )
        wide = visit.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, (name, wide)
        nameless = visit.page.evaluate(
            """() => [...document.querySelectorAll('input, textarea, button, [role=button], select')]
              .filter(one => one.offsetParent && !one.hidden && one.type !== 'hidden')
              .filter(one => !(one.ariaLabel || one.innerText?.trim() || one.title || one.placeholder
                || [...(one.labels || [])].some(label => label.innerText.trim())
                || one.getAttribute('aria-labelledby')))
              .map(one => one.outerHTML.slice(0, 200))"""
        )
        assert not nameless, name
    dark = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in re.findall(r"\d+", dark)[:3]) > 3 * 128
    assert light == (colours == "light")
    visit.close()


def test_a_password_guards_everything(browser, folder):
    """With `--listen` the page needs the password, and works with it."""
    with served(folder, "--listen", LOWMEM_IMAGIC_PASSWORD="correct horse") as address:
        stranger = browser.new_context()
        assert stranger.request.get(address).status == 401
        stranger.close()
        known = {"username": "me", "password": "correct horse"}
        visit = Visit(browser, address, http_credentials=known)
        visit.choose_photo(folder / "photo-0.png")
        visit.tab("Edits")
        assert visit.page.locator("#hub-push").count() == 0
        visit.close()
