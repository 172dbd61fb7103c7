"use strict";
// Tips of marks in charts: a pointer, a finger or the keyboard.
const tip = document.getElementById("tip");
function showTip(mark) {
  const box = mark.getBoundingClientRect();
  tip.textContent = mark.dataset.text;
  tip.hidden = false;
  const left = Math.min(box.left + box.width / 2 - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${box.top > tip.offsetHeight + 12 ? box.top - tip.offsetHeight - 8 : box.bottom + 8}px`;
}
const hideTip = () => { tip.hidden = true; };
for (const mark of document.querySelectorAll(".mark")) {
  const title = mark.querySelector("title");
  mark.dataset.text = title.textContent;
  title.remove(); // the tip takes its place
  mark.setAttribute("tabindex", "0");
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", mark.dataset.text);
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => showTip(mark));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, hideTip);
}
addEventListener("scroll", () => { // focusing a mark may scroll to it
  const focused = document.activeElement.closest(".mark");
  if (focused) showTip(focused); else hideTip();
}, { passive: true });

// Tokens coloured by how many experts they use in the chosen layer.
const routing = document.getElementById("routing");
if (routing) {
  const { pieces, experts, counts, bits } = JSON.parse(routing.textContent);
  const layer = document.getElementById("layer");
  const text = document.getElementById("text");
  const chosen = document.getElementById("chosen");
  const mean = (values) => values.reduce((sum, one) => sum + one, 0) / values.length;
  const tokens = pieces.map((piece, index) => {
    const token = document.createElement("span");
    token.className = "token";
    token.setAttribute("role", "button");
    token.tabIndex = index ? -1 : 0; // one stop for the keyboard; arrows go on from there
    const word = piece.trim() ? piece.trimStart() : piece;
    text.append(piece.slice(0, piece.length - word.length)); // the space before a word is not coloured
    const lines = word.match(/\n*$/)[0]; // the next line begins after the token and its number
    token.textContent = word.replace(/\n/g, "↵") || "·";
    token.setAttribute("aria-pressed", "false");
    token.addEventListener("click", () => choose(index));
    token.addEventListener("keydown", (event) => press(event, index));
    text.append(token, lines);
    return token;
  });
  let current = null;

  function press(event, index) {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Enter: index, " ": index }[event.key];
    if (to === undefined || !tokens[to]) return;
    event.preventDefault();
    choose(to);
    tokens[to].focus();
  }

  function used(index) {
    return layer.value === "all" ? mean(counts.map((one) => one[index])) : counts[layer.value][index];
  }
  function written(value) {
    return layer.value === "all" ? value.toFixed(1) : String(value);
  }
  function colour() {
    const values = tokens.map((_, index) => used(index));
    const low = Math.min(...values), high = Math.max(...values);
    tokens.forEach((token, index) => {
      token.style.setProperty("--share", (0.6 * (values[index] - low) / (high - low || 1)).toFixed(3));
      token.dataset.count = written(values[index]);
      token.title = `${written(values[index])} experts`;
    });
    document.getElementById("fewest").textContent = `${written(low)} experts`;
    document.getElementById("most").textContent = `${written(high)}`;
    if (current !== null) choose(current);
  }
  function fires(of, index, expert) {
    return (parseInt(bits[of][index][expert >> 2], 16) >> (3 - (expert & 3))) & 1;
  }
  function choose(index) {
    if (current !== null) tokens[current].setAttribute("aria-pressed", "false");
    tokens.forEach((token, other) => { token.tabIndex = other === index ? 0 : -1; });
    current = index;
    tokens[index].setAttribute("aria-pressed", "true");
    const shown = layer.value === "all" ? counts.map((_, of) => of) : [Number(layer.value)];
    const total = mean(shown.map((of) => experts[of]));
    chosen.replaceChildren();
    const line = document.createElement("p");
    const where = layer.value === "all" ? "mean of all layers" : `layer ${layer.value}`;
    line.textContent = `Token ${index + 1}, “${pieces[index].trim() || "white space"}”, ${where}: ` +
      `${written(used(index))} of ${total} experts.`;
    chosen.append(line);
    if (!bits) return;
    if (shown.length === 1) {
      const names = [...Array(experts[shown[0]]).keys()].filter((expert) => fires(shown[0], index, expert));
      line.textContent += ` They are ${names.join(", ") || "none"}.`;
    }
    chosen.append(grid(shown, index));
    if (shown.length > 1) {
      const key = document.createElement("p");
      key.className = "key";
      key.textContent = "A row a layer, from the first; a cell an expert; filled where it fires.";
      chosen.append(key);
    }
  }
  // A row a layer, a cell an expert; filled where it fires.
  function grid(shown, index) {
    const cell = 10, name = "http://www.w3.org/2000/svg";
    const width = Math.max(...shown.map((of) => experts[of]));
    const columns = shown.length === 1 ? Math.min(width, 64) : width;
    const rows = shown.length === 1 ? Math.ceil(width / columns) : shown.length;
    let idle = "", active = "";
    shown.forEach((of, row) => {
      for (let expert = 0; expert < experts[of]; expert++) {
        const x = cell * (expert % columns), y = cell * (shown.length === 1 ? Math.floor(expert / columns) : row);
        const path = `M${x + 1} ${y + 1}h8v8h-8z`;
        if (fires(of, index, expert)) active += path; else idle += path;
      }
    });
    const svg = document.createElementNS(name, "svg");
    svg.setAttribute("viewBox", `0 0 ${cell * columns} ${cell * rows}`);
    svg.setAttribute("width", String(cell * columns));
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", shown.length === 1 ? "experts; filled: fires" : "a row a layer, a cell an expert; filled: fires");
    for (const [d, fill] of [[idle, "none"], [active, "rgb(var(--use))"]]) {
      const path = document.createElementNS(name, "path");
      path.setAttribute("d", d);
      path.setAttribute("style", `fill:${fill};stroke:var(--line);stroke-width:.5`);
      svg.append(path);
    }
    return svg;
  }
  function step(by) {
    layer.selectedIndex = (layer.selectedIndex + by + layer.length) % layer.length;
    colour();
  }
  layer.addEventListener("change", colour);
  document.getElementById("layer-down").addEventListener("click", () => step(-1));
  document.getElementById("layer-up").addEventListener("click", () => step(1));
  document.getElementById("numbers").addEventListener("change", (event) => {
    text.classList.toggle("numbers", event.target.checked);
  });
  layer.value = "all";
  colour();
}
