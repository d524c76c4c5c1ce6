"use strict";
// Moments in the viewer's zone; wide tables by the keyboard; a question before what cannot be undone; the playground.
(() => {
  const format = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const brief = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "numeric", minute: "2-digit" });
  const year = new Date().getFullYear();
  // What happens within a minute is told apart by its seconds.
  const fine = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "numeric", minute: "2-digit", second: "2-digit" });
  const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
  const localize = (root) => {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.getAttribute("datetime"));
      if (Number.isNaN(at.getTime())) continue;
      const close = time.closest(".events") ? fine : brief;
      const text = (at.getFullYear() === year ? close : format).format(at);
      if (time.textContent === text) continue;
      time.textContent = text;
      time.title = exact.format(at);
    }
  };
  // What is larger than its place is scrolled by the keyboard too.
  const reach = () => {
    for (const box of document.querySelectorAll(".scroll, .events, pre")) {
      const fits = box.scrollWidth <= box.clientWidth && box.scrollHeight <= box.clientHeight + 1;
      if (fits) { box.removeAttribute("tabindex"); continue; }
      if (box.tabIndex === 0) continue;
      box.tabIndex = 0;
      if (box.tagName === "OL") box.setAttribute("aria-label", "Events");
      else {
        box.setAttribute("role", "group");
        box.setAttribute("aria-label", box.querySelector("caption")?.textContent ?? "Text");
      }
    }
  };
  let due = 0;
  const soon = () => { cancelAnimationFrame(due); due = requestAnimationFrame(reach); };
  const tend = () => { localize(document); soon(); };
  localize(document);
  reach();
  addEventListener("load", reach);
  addEventListener("resize", soon);
  // Whatever a stream brings in is in UTC again.
  new MutationObserver(tend).observe(document.body, { childList: true, subtree: true, characterData: true });

  // A refresh by the browser itself could strike while somebody types or answers a question.
  const again = document.querySelector('meta[name="look-again"]');
  const busy = () => document.activeElement?.closest("form") || document.querySelector("dialog[open]");
  if (again) setInterval(() => { if (!busy()) location.reload(); }, Number(again.content) * 1000);

  const ask = (form) => {
    const dialog = document.createElement("dialog");
    const words = document.createElement("p");
    words.textContent = form.dataset.ask;
    const buttons = document.createElement("div");
    buttons.className = "row";
    for (const [word, kind, act] of [["Yes", "danger", () => form.submit()], ["No", "", () => {}]]) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = word;
      button.className = kind;
      button.addEventListener("click", () => { dialog.close(); act(); });
      buttons.append(button);
    }
    dialog.append(words, buttons);
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  };
  document.addEventListener("submit", (event) => {
    if (!event.target.dataset.ask) return;
    event.preventDefault();
    ask(event.target);
  });

  const talk = document.querySelector("form[data-talk]");
  if (!talk) return;
  for (const pane of talk.querySelectorAll("[data-pane]")) {
    const scale = pane.querySelector("[name=scale]");
    const shown = () => { pane.querySelector("output").textContent = `${scale.value} ×`; };
    scale.addEventListener("input", shown);
    shown(); // a browser keeps what was set before a reload
  }
  let going = [];
  const say = async (pane, signal) => {
    const answer = pane.querySelector(".answer");
    const remark = pane.querySelector(".remark");
    const model = pane.querySelector("[name=model]").value;
    answer.textContent = remark.textContent = "";
    if (!model) return;
    const system = talk.elements.system.value.trim();
    const body = { model, stream: true, max_tokens: Number(talk.elements.max_tokens.value),
      temperature: Number(talk.elements.temperature.value),
      messages: [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: talk.elements.question.value }] };
    const scale = Number(pane.querySelector("[name=scale]").value);
    if (scale !== 1) body.tunepool = { scale };
    const begun = performance.now();
    remark.textContent = "…";
    const ask = () => fetch("/ui/playground/answers", { method: "POST", signal,
      headers: { "Content-Type": "application/json", "X-Page-Proof": talk.elements.proof.value }, body: JSON.stringify(body) });
    let response = await ask();
    let told = response.ok ? null : await response.json().catch(() => null);
    // A model that is not in memory yet may take longer than a request waits for it.
    for (let again = 0; told?.error?.code === "playground_busy" && again < 4; again += 1) {
      remark.textContent = "The model is on its way into memory, or answers others. It is asked again by itself.";
      response = await ask();
      told = response.ok ? null : await response.json().catch(() => null);
    }
    if (!response.ok) {
      remark.textContent = told?.error?.message ?? `The answer failed (${response.status}).`;
      return;
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", pieces = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) { remark.textContent = chunk.error.message; return; }
        const text = chunk.choices?.[0]?.delta?.content ?? "";
        pieces += text ? 1 : 0;
        answer.textContent += text;
      }
    }
    remark.textContent = `${pieces} pieces in ${((performance.now() - begun) / 1000).toFixed(1)} s`;
  };
  talk.addEventListener("submit", (event) => {
    event.preventDefault();
    going.forEach((one) => one.abort());
    going = [];
    for (const pane of talk.querySelectorAll("[data-pane]")) {
      const control = new AbortController();
      going.push(control);
      say(pane, control.signal).catch((error) => {
        if (error.name !== "AbortError") pane.querySelector(".remark").textContent = "The connection was lost. Ask again.";
      });
    }
  });
  talk.querySelector("[data-stop]").addEventListener("click", () => going.forEach((one) => one.abort()));
})();
