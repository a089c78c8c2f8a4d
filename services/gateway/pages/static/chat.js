"use strict";
// The chat page: streams an answer, shows its sources, sends judgements of it.

const conversation = document.querySelector("#conversation");
const form = document.querySelector("#ask");
const question = document.querySelector("#question");
const send = document.querySelector("#send");
const stop = document.querySelector("#stop");
const model = document.body.dataset.model;
let turns = [];
let running = null;

// An application opens the page as /#customer=<token>; a fragment never reaches a server's log.
const customer = new URLSearchParams(location.hash.slice(1)).get("customer");

function headers() {
  return { "content-type": "application/json", ...(customer ? { "x-customer-token": customer } : {}) };
}

function add(kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  turn.textContent = text;
  for (const hint of conversation.querySelectorAll(".hint")) hint.remove();
  conversation.append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The gateway answered with status ${response.status}.`;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask(text) {
  add("user", text);
  turns.push({ role: "user", content: text });
  const bubble = add("assistant", "");
  bubble.setAttribute("aria-busy", "true");
  running = new AbortController();
  send.hidden = true;
  stop.hidden = false;
  let about = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ model, messages: turns, stream: true }),
      signal: running.signal,
    });
    if (response.status === 401 && !customer) location.assign("/login?next=/");
    if (!response.ok) throw new Error(await problem(response));
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      bubble.textContent += chunk.choices[0]?.delta?.content ?? "";
      about = chunk.steersman ?? about;
      conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      bubble.classList.add("error");
      bubble.textContent = error.message;
      turns.pop();
      return;
    }
  } finally {
    bubble.removeAttribute("aria-busy");
    send.hidden = false;
    stop.hidden = true;
    running = null;
    question.focus();
  }
  turns.push({ role: "assistant", content: bubble.textContent });
  if (about) finish(bubble, about);
}

function finish(bubble, about) {
  if (about.sources?.length) {
    const list = document.createElement("ul");
    list.className = "sources";
    list.setAttribute("aria-label", "Sources");
    for (const source of about.sources) {
      const item = document.createElement("li");
      item.textContent = `${source.system} · ${source.record}`;
      list.append(item);
    }
    conversation.append(list);
  }
  for (const proposal of about.proposed_actions ?? []) addProposal(proposal);
  const tools = document.querySelector("#answer-tools").content.firstElementChild.cloneNode(true);
  conversation.append(tools);
  tools.scrollIntoView({ block: "end" });
  const up = tools.querySelector(".up");
  const down = tools.querySelector(".down");
  up.addEventListener("click", () => judge(tools, about, { thumbs: "up" }, up, down));
  down.addEventListener("click", () => judge(tools, about, { thumbs: "down" }, down, up));
  tools.querySelector(".edit").addEventListener("click", () => edit(bubble, tools, about));
}

function addProposal(proposal) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Confirm";
  button.addEventListener("click", async () => {
    button.disabled = true;
    const response = await fetch(`/v1/actions/${proposal.id}/confirm`, { method: "POST", headers: headers() });
    if (!response.ok) {
      add("assistant", await problem(response)).classList.add("error");
      button.disabled = false;
      return;
    }
    add("assistant", (await response.json()).text);
    button.remove();
  });
  conversation.append(button);
}

async function judge(tools, about, judgement, chosen, other) {
  const said = tools.querySelector(".said");
  const response = await fetch("/v1/feedback", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ event_id: crypto.randomUUID(), answer_id: about.answer_id, ...judgement }),
  });
  const thanks = "kept" in document.body.dataset ? "Thank you." : "Thank you. It is forgotten when this gateway stops.";
  said.textContent = response.ok ? thanks : await problem(response);
  if (response.ok && chosen) {
    chosen.setAttribute("aria-pressed", "true");
    other.setAttribute("aria-pressed", "false");
  }
}

function edit(bubble, tools, about) {
  if (tools.querySelector("textarea")) return;
  const box = document.createElement("textarea");
  box.rows = 4;
  box.value = bubble.textContent;
  box.setAttribute("aria-label", "What the answer should have been");
  const save = document.createElement("button");
  save.type = "button";
  save.textContent = "Save";
  save.addEventListener("click", async () => {
    await judge(tools, about, { edited_answer: box.value });
    box.remove();
    save.remove();
  });
  tools.append(box, save);
  box.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => running?.abort());
document.querySelector("#new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  conversation.replaceChildren();
  question.focus();
});
