"use strict";
// The chat page: streams an answer, shows its sources, takes judgements of it, and keeps the conversation of this tab.

const conversation = document.querySelector("#conversation");
const form = document.querySelector("#ask");
const question = document.querySelector("#question");
const send = document.querySelector("#send");
const stop = document.querySelector("#stop");
const model = document.body.dataset.model;
const kept = "kept" in document.body.dataset;
// Answers are Markdown without HTML; pictures would be fetched from wherever a text says.
const markdown = window.markdownit({ html: false, breaks: true, linkify: false }).disable("image");
let turns = []; // {role, content, about}; of a question without an answer {role, content, failure}
let running = null; // AbortController of the answer that streams

const embedded = "embedded" in document.body.dataset;
// An application opens the page as /#customer=<token>; a fragment never reaches a server's log.
const handed = new URLSearchParams(location.hash.slice(1));
const customer = handed.get("customer");
const key = embedded ? handed.get("key") : null;
// Another customer, or somebody else who signs in, does not see this one's conversation in the same tab.
const KEY = `steersman-chat-${model}-${document.body.dataset.person}-${(customer ?? "").slice(-16)}`;
const LEFT = "The page was left before an answer came.";

function headers() {
  return {
    "content-type": "application/json",
    ...(customer ? { "x-customer-token": customer } : {}),
    ...(key ? { authorization: `Bearer ${key}` } : {}),
  };
}

function copyOf(template) {
  return document.querySelector(template).content.firstElementChild.cloneNode(true);
}

// crypto.randomUUID is missing where a page came over plain http from another machine.
function uniqueId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function remember() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(turns));
  } catch {
    // Full or forbidden: the conversation lives as long as the page.
  }
}

function add(kind, text) {
  const turn = document.createElement("div");
  turn.className = `turn ${kind}`;
  show(turn, kind, text);
  conversation.querySelector(".welcome")?.remove();
  conversation.append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

function show(turn, kind, text) {
  if (kind !== "assistant") {
    turn.textContent = text;
    return;
  }
  turn.innerHTML = markdown.render(text);
  for (const link of turn.querySelectorAll("a")) {
    link.rel = "noopener noreferrer nofollow";
    link.target = "_blank";
  }
}

function welcome() {
  const box = copyOf("#welcome");
  for (const button of box.querySelectorAll("button")) {
    button.addEventListener("click", () => running || ask(button.textContent));
  }
  conversation.replaceChildren(box);
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
  const asked = add("user", text);
  const turn = { role: "user", content: text, failure: LEFT };
  const messages = [...turns.filter(({ failure }) => !failure), turn].map(({ role, content }) => ({ role, content }));
  turns.push(turn);
  remember();
  const bubble = add("assistant", "");
  bubble.setAttribute("aria-busy", "true");
  const mine = (running = new AbortController());
  busy(true);
  let about = null;
  let said = "";
  let failure = null;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ model, messages, stream: true }),
      signal: mine.signal,
    });
    if (response.status === 401 && !customer && !embedded) location.assign("/login?next=/");
    if (!response.ok) throw new Error(await problem(response));
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      said += chunk.choices[0]?.delta?.content ?? "";
      about = chunk.steersman ?? about;
      show(bubble, "assistant", said);
      conversation.scrollTop = conversation.scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
    else if (!said) failure = "Stopped before an answer came.";
  }
  if (running !== mine) return; // a new conversation has begun meanwhile
  running = null;
  busy(false);
  bubble.removeAttribute("aria-busy");
  question.focus();
  if (failure !== null) {
    turn.failure = failure;
    remember();
    failed(asked, bubble, turn);
    return;
  }
  delete turn.failure;
  turns.push({ role: "assistant", content: said, about });
  remember();
  if (about) finish(bubble, turns.at(-1));
}

function busy(yes) {
  send.hidden = yes;
  stop.hidden = !yes;
}

// The question stays where it is, with what went wrong and a way to ask it again.
function failed(asked, bubble, turn) {
  bubble.classList.add("error");
  bubble.textContent = `${turn.failure} `;
  const again = document.createElement("button");
  again.type = "button";
  again.className = "quiet";
  again.textContent = "Send again";
  again.addEventListener("click", () => {
    if (running) return;
    asked.remove();
    bubble.remove();
    turns = turns.filter((other) => other !== turn);
    ask(turn.content);
  });
  bubble.append(again);
}

function finish(bubble, turn) {
  const about = turn.about;
  if (about.sources?.length) {
    const list = document.createElement("ul");
    list.className = "sources";
    list.setAttribute("aria-label", "Sources");
    for (const source of about.sources) {
      const item = document.createElement("li");
      const record = document.createElement("b");
      record.textContent = source.record;
      item.append(`${source.system} · `, record);
      list.append(item);
    }
    conversation.append(list);
  }
  for (const proposal of about.proposed_actions ?? []) addProposal(proposal, about);
  const tools = copyOf("#answer-tools");
  conversation.append(tools);
  tools.scrollIntoView({ block: "end" });
  const up = tools.querySelector(".up");
  const down = tools.querySelector(".down");
  const press = (value) => {
    up.setAttribute("aria-pressed", String(value === "up"));
    down.setAttribute("aria-pressed", String(value === "down"));
  };
  const thumb = async (value) => {
    if (!(await judge(tools, about, { thumbs: value }))) return;
    press(value);
    turn.thumb = value;
    remember();
    tools.querySelector(".reason")?.remove();
    if (value === "down") askReason(tools, about);
  };
  press(turn.thumb);
  up.addEventListener("click", () => thumb("up"));
  down.addEventListener("click", () => thumb("down"));
  tools.querySelector(".edit").addEventListener("click", () => edit(turn, tools));
}

// A card with what would be done; it stays, with what came of it, until the person says.
function addProposal(proposal, about) {
  const card = copyOf("#proposal");
  const [text, said] = card.querySelectorAll("p");
  const [confirm, dismiss] = card.querySelectorAll("button");
  text.textContent = proposal.text ?? "";
  const settle = () => {
    confirm.remove();
    dismiss.remove();
    said.textContent = proposal.done;
    remember();
  };
  confirm.addEventListener("click", async () => {
    confirm.disabled = dismiss.disabled = true;
    try {
      const response = await fetch(`/v1/actions/${proposal.id}/confirm`, { method: "POST", headers: headers() });
      if (!response.ok) throw new Error(await problem(response));
      proposal.done = (await response.json()).text;
      settle();
    } catch (error) {
      said.textContent = error.message;
      confirm.disabled = dismiss.disabled = false;
    }
  });
  dismiss.addEventListener("click", () => {
    about.proposed_actions = about.proposed_actions.filter((other) => other !== proposal);
    remember();
    card.remove();
    question.focus();
  });
  conversation.append(card);
  if (proposal.done) settle();
}

// Sends one judgement and says what became of it; true when it is stored.
async function judge(tools, about, judgement) {
  const said = tools.querySelector(".said");
  try {
    const response = await fetch("/v1/feedback", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify({ event_id: uniqueId(), answer_id: about.answer_id, ...judgement }),
    });
    const thanks = kept ? "Thank you." : "Thank you. It is forgotten when this gateway stops.";
    said.textContent = response.ok ? thanks : await problem(response);
    return response.ok;
  } catch (error) {
    said.textContent = `It could not be sent: ${error.message}`;
    return false;
  }
}

function askReason(tools, about) {
  const box = copyOf("#reason");
  box.addEventListener("submit", async (event) => {
    event.preventDefault();
    const reason = box.elements.reason.value.trim();
    if (!reason || (await judge(tools, about, { thumbs: "down", reason }))) box.remove();
  });
  tools.append(box);
  box.elements.reason.focus();
}

function edit(turn, tools) {
  if (tools.querySelector("textarea")) return;
  const box = document.createElement("textarea");
  box.rows = 4;
  box.value = turn.content;
  box.setAttribute("aria-label", "What the answer should have been");
  const save = document.createElement("button");
  save.type = "button";
  save.textContent = "Save";
  save.addEventListener("click", async () => {
    if (!(await judge(tools, turn.about, { edited_answer: box.value }))) return;
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
if (embedded) {
  addEventListener("focus", () => question.focus());
  addEventListener("keydown", (event) => event.key === "Escape" && parent.postMessage("steersman-close", "*"));
}
document.querySelector("#new").addEventListener("click", () => {
  running?.abort();
  running = null;
  busy(false);
  turns = [];
  remember();
  welcome();
  question.focus();
});

welcome();
try {
  turns = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
} catch {
  turns = [];
}
for (const turn of [...turns]) {
  const bubble = add(turn.role, turn.content);
  if (turn.failure) failed(bubble, add("assistant", ""), turn);
  if (turn.about) finish(bubble, turn);
}
