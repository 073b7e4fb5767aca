"use strict";
// Texts from the service go in as text, never as markup; the page talks to nobody else.
const $ = id => document.getElementById(id);
const COLOURS = ["#e6194b", "#0072e3", "#f58231", "#2ca02c", "#911eb4", "#00a3a3", "#d4a017", "#c2187e"];
let token = "", model = null, last = null;

async function ask(path, options = {}) {
  const headers = {...options.headers, ...(token ? {Authorization: "Bearer " + token} : {})};
  let r;
  try { r = await fetch(path, {...options, headers}); }
  catch { throw new Error("The service cannot be reached."); }
  const said = await r.json().catch(() => ({}));
  if (r.status === 401) {
    $("ask").hidden = false;
    $("model").textContent = "Who shows the token may ask.";
  }
  if (!r.ok) throw new Error(said.detail ? `${said.title}: ${said.detail}` : `The service answered ${r.status}.`);
  return said;
}

function trouble(e) {
  $("trouble").textContent = e ? e.message : "";
  $("trouble").hidden = !e;
}

function inWords(op) {
  const parts = [`A picture counts as defective from a score of ${op.score_threshold.toFixed(3)}.`];
  if (op.review_from !== null && op.review_from !== undefined) parts.push(`From ${op.review_from.toFixed(3)} up to there, a person should look.`);
  if (op.chosen_for) parts.push(`Chosen for: ${op.chosen_for}.`);
  return parts.join(" ");
}

async function meet() {
  model = await ask("v1/model");
  $("ask").hidden = true;
  $("model").textContent = `${model.name}, version ${model.version}; it knows ${model.classes.slice(1).join(", ")}`;
}

function image(url) {
  return new Promise((done, failed) => {
    const im = new Image();
    im.onload = () => done(im);
    im.onerror = () => failed(new Error("no picture"));
    im.src = url;
  });
}

async function painted(png) { // the mask as a canvas: each class in its colour
  const im = await image("data:image/png;base64," + png), c = document.createElement("canvas");
  [c.width, c.height] = [im.width, im.height];
  const g = c.getContext("2d");
  g.drawImage(im, 0, 0);
  const px = g.getImageData(0, 0, c.width, c.height), rgb = COLOURS.map(h => [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16)));
  for (let i = 0; i < px.data.length; i += 4) {
    const k = px.data[i];
    if (k) px.data.set([...rgb[(k - 1) % rgb.length], 255], i);
    else px.data[i + 3] = 0;
  }
  g.putImageData(px, 0, 0);
  return c;
}

function colour(cls) { return COLOURS[Math.max(0, model.classes.indexOf(cls) - 1) % COLOURS.length]; }

function draw() {
  if (!last) return;
  const {answer, picture, mask} = last, c = $("picture"), g = c.getContext("2d");
  const scale = Math.max(1, Math.min(4, 640 / Math.max(answer.width, answer.height))); // a small picture is drawn larger, so that lines and words stay thin
  [c.width, c.height] = [answer.width * scale, answer.height * scale];
  g.imageSmoothingEnabled = false;
  g.fillStyle = "#d6dbe3";
  g.fillRect(0, 0, c.width, c.height);
  if (picture) g.drawImage(picture, 0, 0, c.width, c.height);
  g.globalAlpha = $("strength").value / 100;
  g.drawImage(mask, 0, 0, c.width, c.height);
  g.globalAlpha = 1;
  if (!$("boxes").checked) return;
  const unit = Math.max(1, c.width / (c.clientWidth || c.width)); // words have one size on the screen, however large the picture is
  g.lineWidth = 2 * unit;
  g.font = `${14 * unit}px system-ui, sans-serif`;
  for (const r of answer.regions.slice(0, 50)) {
    const [l, t, right, bottom] = r.box.map(v => v * scale), text = `${r.class} ${r.score.toFixed(2)}`, w = g.measureText(text).width + 8 * unit, h = 19 * unit;
    g.strokeStyle = g.fillStyle = colour(r.class);
    g.strokeRect(l, t, right - l, bottom - t);
    const x = Math.max(0, Math.min(l - unit, c.width - w)), y = t >= h ? t - h : Math.min(bottom, c.height - h);
    g.fillRect(x, y, w, h);
    g.fillStyle = "#fff";
    g.fillText(text, x + 4 * unit, y + 14 * unit);
  }
}

function tell(a) {
  const op = model.operating_point, v = $("verdict"), body = $("regions").tBodies[0];
  v.className = a.verdict;
  v.textContent = {ok: "Good", review: "A person should look", defect: "Defective"}[a.verdict];
  $("score").textContent = `Score ${a.score.toFixed(3)}` + (a.probability === null ? "" : `, chance of a defect ${a.probability.toFixed(2)}`) + (a.novelty === null ? "" : `, novelty ${a.novelty.toFixed(2)}` + (a.decided_by === "novelty" ? ": unlike the good pictures" : ""));
  $("value").style.width = `${100 * a.score}%`;
  $("threshold").style.left = `calc(${100 * op.score_threshold}% - 1.5px)`;
  $("words").textContent = inWords(op);
  body.replaceChildren(...a.regions.slice(0, 20).map(r => {
    const row = document.createElement("tr"), mark = document.createElement("i");
    mark.style.background = colour(r.class);
    for (const text of [r.class, r.score.toFixed(2), `${r.area} px`, `${r.box[0]}, ${r.box[1]}`]) row.insertCell().textContent = text;
    row.cells[0].prepend(mark);
    return row;
  }));
  $("regions").hidden = !a.regions.length;
  $("more").textContent = a.regions_total > 20 ? `and ${a.regions_total - 20} smaller ones` : a.regions_total ? "" : "No region was found.";
  $("timing").textContent = `${a.width}×${a.height} px; ${(a.timing.waiting + a.timing.decoding + a.timing.predicting).toFixed(0)} ms in the service; request ${a.request_id}`;
  $("result").hidden = $("seen").hidden = false;
}

async function judge(file) {
  trouble(null);
  $("drop").setAttribute("aria-busy", "true");
  const url = URL.createObjectURL(file);
  try {
    if (!model) await meet();
    const answer = await ask("v1/predict?mask=png", {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}});
    const picture = await image(url).catch(() => null); // browsers show no TIFF; the mask is drawn all the same
    last = {answer, picture, mask: await painted(answer.mask)};
    tell(answer);
    draw();
  } catch (e) {
    last = null;
    $("result").hidden = $("seen").hidden = true;
    trouble(e);
  } finally {
    URL.revokeObjectURL(url);
    $("drop").removeAttribute("aria-busy");
  }
}

$("file").addEventListener("change", e => { if (e.target.files[0]) judge(e.target.files[0]); });
$("strength").addEventListener("input", draw);
$("boxes").addEventListener("change", draw);
window.addEventListener("resize", draw);
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, e => {
    e.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && e.dataTransfer.files[0]) judge(e.dataTransfer.files[0]);
  });
}
$("ask").addEventListener("submit", e => {
  e.preventDefault();
  token = $("token").value;
  meet().then(() => trouble(null), trouble);
});
meet().catch(trouble);
