"use strict";
// The keys page: what /v1/keys can do, for people. A key itself is seen once, when it is made.

const list = document.querySelector("#keys");
const state = document.querySelector("#state");
const more = document.querySelector("#more");
const made = document.querySelector("#made");
const trouble = document.querySelector("#trouble");
const number = new Intl.NumberFormat("en");
// A limit, what of it is used, and how both are called.
const LIMITS = [
  ["requests_per_minute", null, "requests a minute"],
  ["tokens_per_minute", null, "tokens a minute"],
  ["tokens_per_day", (key) => key.used.today.tokens, "tokens today"],
  ["tokens_per_month", (key) => key.used.this_month.tokens, "tokens this month"],
  ["concurrent", (key) => key.running, "answers at once"],
];

async function call(method, path, body) {
  trouble.textContent = "";
  const response = await fetch(`/v1/keys${path}`, {
    method,
    headers: { "content-type": "application/json" },
    body: body && JSON.stringify(body),
  });
  if (response.status === 401) location.assign("/login?next=/keys");
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.message);
  return answer;
}

// Does something and says what went wrong; the button cannot be pressed twice meanwhile.
async function doing(button, work) {
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    trouble.textContent = error.message;
    trouble.scrollIntoView({ block: "center" });
  }
  button.disabled = false;
}

// What a form says; an empty limit is no limit.
function said(form) {
  const given = new FormData(form);
  const settings = { note: given.get("note").trim(), scopes: given.getAll("scopes") };
  for (const [name] of LIMITS) settings[name] = given.get(name) ? Number(given.get(name)) : null;
  if (given.get("days")) settings.days = Number(given.get("days"));
  return settings;
}

function show(answer, words) {
  made.hidden = false;
  made.querySelector("p").textContent = words;
  made.querySelector("code").textContent = answer.key;
  made.scrollIntoView({ block: "center" });
  made.querySelector("code").focus();
}

const day = (moment) => moment.slice(0, 16).replace("T", " ");

function card(key) {
  const box = document.querySelector("#key").content.firstElementChild.cloneNode(true);
  box.dataset.id = key.id;
  box.querySelector("h2").textContent = key.note || key.id;
  const ends = key.revoked_at ? `revoked ${day(key.revoked_at)}` : key.expires_at ? `until ${day(key.expires_at)}` : "without an end";
  const last = key.last_used_on ? `last used on ${key.last_used_on}` : "never used";
  box.querySelector(".about").textContent = `${key.id} · ${key.scopes.join(", ")} · made ${day(key.created_at)}, ${ends} · ${last}`;
  const uses = box.querySelector(".uses");
  for (const [name, countOf, words] of LIMITS) {
    const now = countOf?.(key) ?? null;
    if (key[name] === null && now === null) continue;
    const item = document.createElement("li");
    const limit = key[name] === null ? "" : number.format(key[name]);
    const used = now === null ? "at most" : `${number.format(now)}${limit && " of"}`;
    item.textContent = [used, limit, words].filter(Boolean).join(" ");
    if (now !== null && key[name] !== null) {
      const meter = document.createElement("meter");
      Object.assign(meter, { max: key[name], high: 0.9 * key[name], value: now });
      meter.setAttribute("aria-label", `${words} of ${key.note || key.id}`);
      item.append(" ", meter);
    }
    uses.append(item);
  }
  const month = document.createElement("li");
  month.textContent = `${number.format(key.used.last_30_days.requests)} requests in the last 30 days`;
  uses.append(month);
  if (key.state === "active") act(box, key);
  else box.querySelector(".actions").remove();
  return box;
}

function act(box, key) {
  const change = box.querySelector(".change form");
  change.elements.note.value = key.note;
  for (const scope of change.querySelectorAll("[name=scopes]")) scope.checked = key.scopes.includes(scope.value);
  for (const [name] of LIMITS) change.elements[name].value = key[name] ?? "";
  const id = encodeURIComponent(key.id);
  change.addEventListener("submit", (event) => {
    event.preventDefault();
    doing(event.submitter, async () => box.replaceWith(card(await call("PATCH", `/${id}`, said(change)))));
  });
  const rotate = box.querySelector(".rotate form");
  rotate.addEventListener("submit", (event) => {
    event.preventDefault();
    doing(event.submitter, async () => {
      const answer = await call("POST", `/${id}/rotate`, { grace_seconds: Number(rotate.elements.grace.value) });
      await load();
      show(answer, `The successor of ${key.note || key.id}:`);
    });
  });
  const revoke = box.querySelector(".revoke button");
  revoke.addEventListener("click", () =>
    doing(revoke, async () => {
      await call("DELETE", `/${id}`);
      await load();
    }),
  );
}

async function load(after = "") {
  const query = new URLSearchParams({ limit: 50, ...(after && { after }), ...(state.value && { state: state.value }) });
  const answer = await call("GET", `?${query}`);
  const cards = answer.data.map(card);
  if (after) list.append(...cards);
  else list.replaceChildren(...(cards.length ? cards : ["There is no such key."]));
  more.hidden = !answer.has_more;
  more.dataset.after = answer.data.at(-1)?.id ?? "";
}

const make = document.querySelector("#make");
make.addEventListener("submit", (event) => {
  event.preventDefault();
  doing(event.submitter, async () => {
    const settings = said(make);
    const answer = await call("POST", "", settings);
    make.reset();
    await load();
    show(answer, `The key of ${settings.note || answer.id}:`);
  });
});
made.querySelector("button").addEventListener("click", async (event) => {
  const key = made.querySelector("code");
  try {
    await navigator.clipboard.writeText(key.textContent);
    event.target.textContent = "Copied";
  } catch {
    // Over plain http there is no clipboard: the text is marked, for the person to copy.
    getSelection().selectAllChildren(key);
  }
});
state.addEventListener("change", () => doing(more, () => load()));
more.addEventListener("click", () => doing(more, () => load(more.dataset.after)));
doing(more, () => load());
