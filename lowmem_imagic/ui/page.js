// The slider along eta and the before/after slider move between pictures that are there, without a request. Pictures of
// several seeds are a row each.
window.studio = {
  eta: null,
  seed: null,
  cut: 0,
  slide(eta) {
    this.eta = eta;
    this.apply();
  },
  apply() {
    const viewer = document.querySelector("#viewer .viewer");
    if (!viewer) return;
    const cut = viewer.querySelector(".cut input");
    if (cut && Number(cut.value) !== this.cut) cut.value = this.cut;
    viewer.querySelector(".compare").style.setProperty("--cut", this.cut + "%");
    const all = [...viewer.querySelectorAll(".row button")];
    if (this.eta === null || !all.length) return;
    // The slider stays in the row of the seed that is shown.
    const own = all.filter((button) => button.dataset.seed === this.seed);
    const row = own.length ? own : all.filter((button) => button.dataset.seed === all[0].dataset.seed);
    const distance = (button) => Math.abs(Number(button.dataset.eta) - this.eta);
    const nearest = row.reduce((best, button) => (distance(button) < distance(best) ? button : best));
    const after = viewer.querySelector(".after");
    if (after.getAttribute("src") !== nearest.dataset.src) after.src = nearest.dataset.src;
    after.alt = nearest.querySelector("img").alt;
    // Only if it changed: the observer below sees changes made here, too.
    const output = viewer.querySelector(".now output");
    if (output.textContent !== nearest.dataset.eta) output.textContent = nearest.dataset.eta;
    all.forEach((button) => button.setAttribute("aria-current", button === nearest ? "true" : "false"));
  },
};
document.addEventListener("input", (event) => {
  if (!event.target.matches || !event.target.matches("#viewer .cut input")) return;
  window.studio.cut = Number(event.target.value);
  window.studio.apply();
});
document.addEventListener("click", (event) => {
  const button = event.target.closest && event.target.closest("#viewer .row button");
  if (!button) return;
  window.studio.seed = button.dataset.seed;
  window.studio.slide(Number(button.dataset.eta));
});
// Let go by keyboard, the slider renders its own eta, as it does by mouse; several presses are one way to an eta.
let letGo;
document.addEventListener("keyup", (event) => {
  if (!event.target.matches || !event.target.matches("#eta input[type=range]")) return;
  if (!/^(Arrow|Page|Home|End)/.test(event.key)) return;
  clearTimeout(letGo);
  letGo = setTimeout(() => document.querySelector("#finer").click(), 600);
});
// What was typed outlives a reload, which the page's library begins by itself after a lost connection.
const TYPED = ["sentence", "train-sentences", "batch-sentences"];
const FIELDS = TYPED.map((id) => `#${id} textarea, #${id} input`).join(", ");
const placeOf = (field) => "typed: " + TYPED.find((id) => field.closest("#" + id));
document.addEventListener("input", (event) => {
  const field = event.target;
  if (field.matches && field.matches(FIELDS)) sessionStorage.setItem(placeOf(field), field.value);
});
function typeAgain(field) {
  if (field.dataset.typed) return;
  field.dataset.typed = "yes";
  const text = sessionStorage.getItem(placeOf(field));
  if (!text || field.value) return;
  field.value = text;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}
// New pictures keep the place of both sliders; the tab remembers its photo.
new MutationObserver(() => {
  document.querySelectorAll(FIELDS).forEach(typeAgain);
  const photo = document.querySelector("#photo [data-project]");
  if (photo) sessionStorage.setItem("project", photo.dataset.project);
  window.studio.apply();
}).observe(document.documentElement, { childList: true, subtree: true });
