// Loads this page again while it is visible. If the agent does not answer, a line above the figures reports this, and
// the figures turn grey, because old figures must not look like current ones. The script builds no HTML from text:
// the server alone does, and escapes the text.
"use strict";

const PERIOD_MS = 2000, PATIENCE_MS = 4000, SILENCE_MS = 5000;
const title = document.title, silence = document.getElementById("silence");
let received = Date.now(), asking = false;

// Replaces only the nodes that differ, so that the user's selection of text is kept.
function update(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const alike = old.cloneNode().isEqualNode(fresh.cloneNode()) && old.childNodes.length === fresh.childNodes.length;
  if (!alike || !old.hasChildNodes()) return old.replaceWith(fresh);
  const parts = [...fresh.childNodes];
  [...old.childNodes].forEach((part, i) => update(part, parts[i]));
}

function tell() {
  const silent = Math.abs(Date.now() - received) > SILENCE_MS; // also if the clock was set: the figures' age is then unknown
  const text = silent ? `no answer from the agent since ${document.querySelector("main time").textContent}: the figures below are from that time` : "";
  if (silence.textContent !== text) silence.textContent = text;
  silence.hidden = !silent;
  document.body.classList.toggle("silent", silent);
  document.title = silent ? `no answer: ${title}` : title;
}

async function ask() {
  const answer = await fetch(location.href, {
    cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(PATIENCE_MS),
  });
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const main = page.querySelector("main");
  if (!answer.ok || !main) throw new Error("another server answers");
  if (page.documentElement.dataset.version !== document.documentElement.dataset.version) location.reload();
  update(document.querySelector("main"), document.adoptNode(main));
  received = Date.now();
}

async function look() {
  tell();
  if (document.hidden || asking) return;
  asking = true;
  try {
    await ask();
  } catch {
    // tell() shows that there is no answer after SILENCE_MS
  } finally {
    asking = false;
    tell();
  }
}

setInterval(look, PERIOD_MS);
document.addEventListener("visibilitychange", look);
