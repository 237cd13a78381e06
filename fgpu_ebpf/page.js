// Asks for this page again as long as somebody looks at it, and says so where nobody answers: figures that are old must
// not look like those of now. Text becomes elements in the server alone, which escapes it.
"use strict";

const PERIOD_MS = 2000, PATIENCE_MS = 4000, SILENCE_MS = 5000;
const title = document.title, silence = document.getElementById("silence");
let heard = Date.now(), asking = false;

// Changes what differs and nothing else: what is selected stays so.
function mend(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const alike = old.cloneNode().isEqualNode(fresh.cloneNode()) && old.childNodes.length === fresh.childNodes.length;
  if (!alike || !old.hasChildNodes()) return old.replaceWith(fresh);
  const parts = [...fresh.childNodes];
  [...old.childNodes].forEach((part, i) => mend(part, parts[i]));
}

function tell() {
  const silent = Math.abs(Date.now() - heard) > SILENCE_MS; // a clock that was set says nothing of now either
  const text = silent ? `no answer since ${document.querySelector("main time").textContent}: what stands below is of then` : "";
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
  if (!answer.ok || !main) throw new Error("another answers there");
  if (page.documentElement.dataset.version !== document.documentElement.dataset.version) location.reload();
  mend(document.querySelector("main"), document.adoptNode(main));
  heard = Date.now();
}

async function look() {
  tell();
  if (document.hidden || asking) return;
  asking = true;
  try {
    await ask();
  } catch {
    // tell() says so when it has been so for a while
  } finally {
    asking = false;
    tell();
  }
}

setInterval(look, PERIOD_MS);
document.addEventListener("visibilitychange", look);
