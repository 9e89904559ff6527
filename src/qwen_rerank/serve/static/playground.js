"use strict";

const WORDS = {
  en: {
    playground: "playground",
    key: "API key",
    lead: "Round 1 quickly finds candidates among all texts. Round 2 reads question and text together and puts them in order.",
    collection: "Collection",
    sample_zh: "Wikipedia, Chinese",
    sample_en: "Wikipedia, English",
    sample_own: "Your own texts",
    sample_store: "This server's store",
    texts: "One text a line, 200 at most",
    query: "Query",
    go: "Search",
    instruction: "Instruction: what counts as relevant (in English; empty for the model card's)",
    threshold: "Threshold",
    options: "Instruction and threshold",
    another: "Another question",
    not_helped: "does not help",
    first_title: "First stage",
    final_title: "Reranked",
    first_note: (n, total, rest) => `BM25 found ${n} of ${total} texts by shared words${rest ? `; ${rest} more fill up the list` : ""}.`,
    store_note: (n, total) => `The store found ${n} of ${total} passages, by meaning and by words.`,
    final_note: (model, n) => `${model} read all ${n} and put them in order.`,
    final_kept: (kept, n) => `${kept} of ${n} at or above the threshold.`,
    right: (from, to) => `The right text stands at place ${from} before, ${to} after.`,
    right_lost: (n) => `The right text is not among these ${n}: the second round cannot bring it back.`,
    count: (c) => `Counted over all ${c.questions} questions of this collection: the right text comes first in ${c.before} by shared words alone, in ${c.after} after ${c.model} has read the 20 candidates. Sentences of Wikipedia from XQuAD-R (CC BY-SA 4.0).`,
    right_mark: "the right text",
    all: (n) => `Show all ${n}`,
    fewer: "Show fewer",
    tab_prompt: "Prompt",
    prompt_note: "This is what the model reads for the best document. The marked parts come from outside: whatever they hold, none of their characters becomes a control token.",
    no_prompt: "This model does not say how its prompt is built.",
    curl_note: "The same query over the first three candidates, ready for a terminal.",
    code_note: "The second round in your own code, with this server behind it.",
    details: "Prompt and code",
    copy: "Copy",
    copied: "Copied",
    routes: "All routes of this server",
    names: { instruction: "instruction", query: "query", document: "document" },
    unauthorized: "This server asks for an API key. Type it in and press Enter.",
    wrong_key: "The server does not know this key.",
    not_ready: "The model is not ready yet. The page asks again by itself.",
    errors: {},
    unreachable: "The server does not answer.",
    moved: (from, to) => (from === to ? `stays at ${to}` : `from place ${from} to ${to}`),
    is_new: "shared no word with the query",
    model: (name) => `Model: ${name}${{ mini: ", the small model that ships with the package", pocket: ", a tiny model for tests; it is not Qwen3-Reranker" }[name] ?? ""}.`,
    start: "Model: loading …",
  },
  zh: {
    playground: "演练场",
    key: "API 密钥",
    lead: "第一轮（海选）从全部文本中快速找出候选；第二轮（决赛）把问题和正文放在一起读，重新排序。",
    collection: "文档集",
    sample_zh: "维基百科（中文）",
    sample_en: "维基百科（英文）",
    sample_own: "自己的文本",
    sample_store: "服务器上的文件",
    texts: "每行一段文本，最多 200 段",
    query: "查询",
    go: "搜索",
    instruction: "指令：什么算相关（建议用英文；留空则用模型卡的默认指令）",
    threshold: "阈值",
    options: "指令与阈值",
    another: "换一个问题",
    not_helped: "重排没帮上忙",
    first_title: "海选",
    final_title: "决赛",
    first_note: (n, total, rest) => `BM25 按共有的词从 ${total} 段中召回 ${n} 段${rest ? `，另补 ${rest} 段凑足候选` : ""}。`,
    store_note: (n, total) => `按意思和按词，从存储的 ${total} 段中召回 ${n} 段。`,
    final_note: (model, n) => `${model} 读完全部 ${n} 段，重新排了序。`,
    final_kept: (kept, n) => `${n} 段中有 ${kept} 段达到阈值。`,
    right: (from, to) => `正确的那段：重排前第 ${from} 位，重排后第 ${to} 位。`,
    right_lost: (n) => `正确的那段不在这 ${n} 段里，第二轮也找不回来。`,
    count: (c) => `这个文档集的全部 ${c.questions} 个问题：只按共有的词，${c.before} 个问题的正确段落排第一；${c.model} 读过 20 个候选之后，${c.after} 个。文本是维基百科的句子，来自 XQuAD-R（CC BY-SA 4.0）。`,
    right_mark: "正确的那段",
    all: (n) => `显示全部 ${n} 段`,
    fewer: "收起",
    tab_prompt: "提示词",
    prompt_note: "这就是模型为排名第一的文档读到的内容。标出的部分来自外部：无论里面写什么，都不会变成控制符。",
    no_prompt: "这个模型没有说明它的提示词如何构成。",
    curl_note: "同样的查询加前三个候选，可直接在终端运行。",
    code_note: "把第二轮放进自己的代码，由这台服务器打分。",
    details: "提示词与代码",
    copy: "复制",
    copied: "已复制",
    routes: "这台服务器的全部接口",
    names: { instruction: "指令", query: "查询", document: "文档" },
    unauthorized: "这台服务器需要 API 密钥。请填入后按回车。",
    wrong_key: "服务器不认识这个密钥。",
    not_ready: "模型还没准备好，页面会自动重试。",
    errors: {
      instruction_not_taken: "这个模型不接受指令。请清空指令，或把要求写进查询里。",
      query: "查询是空的。",
      no_texts: "请至少填一段文本。",
      too_many_documents: "最多 200 段文本。",
    },
    unreachable: "服务器没有应答。",
    moved: (from, to) => (from === to ? `仍在第 ${to} 位` : `从第 ${from} 位到第 ${to} 位`),
    is_new: "与查询没有共同的词",
    model: (name) => `模型：${name}${{ mini: "，随包附带的小模型", pocket: "，测试用的微型模型，不是 Qwen3-Reranker" }[name] ?? ""}。`,
    start: "模型：加载中……",
  },
};
const FEW = 8;
const TABS = ["prompt", "curl", "langchain", "llamaindex"];

const $ = (id) => document.getElementById(id);
const state = { language: "en", model: null, samples: {}, own: null, answer: null, all: false, tab: "prompt", asked: 0 };
const words = () => WORDS[state.language];
const base = () => new URL(".", location.href).href.replace(/\/$/, "");
const python = (text) => JSON.stringify(text); // a JSON string is a Python string too

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function chosen() {
  return document.querySelector("input[name=collection]:checked").value;
}

function speak(language) {
  state.language = language;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = words()[node.dataset.t];
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", words()[node.dataset.label]);
  for (const name of ["zh", "en"]) $(`lang-${name}`).setAttribute("aria-pressed", String(name === language));
  $("copy").textContent = words().copy;
  showModel();
  if (state.samples[language]) showExamples();
  show();
}

function showModel() {
  const model = state.answer?.model ?? state.model;
  $("model").textContent = model ? words().model(model) : words().start;
}

// A search tells the model too, but there is none before somebody types a question for their own files.
async function askModel() {
  if (state.answer) return;
  const response = await fetch("health/ready").catch(() => null);
  if (response?.ok) {
    state.model = (await response.json()).model;
    showModel();
  } else setTimeout(askModel, 2000);
}

function choose(collection) {
  document.querySelector(`input[name=collection][value=${collection}]`).checked = true;
  $("own").hidden = collection !== "own";
  const sample = state.samples[collection];
  showExamples();
  if (sample) $("query").value = sample.queries[0];
  else if (collection === "store") $("query").value = "";
  else {
    // One's own texts have a question of their own: that of the sample would fit none of them.
    const { own } = state.samples[state.language];
    if (!$("texts").value.trim()) $("texts").value = own.texts.map((text) => text.replace(/\s*\n\s*/g, ": ")).join("\n");
    $("query").value = state.own ?? own.query;
  }
}

function showExamples() {
  const sample = state.samples[chosen()];
  const last = sample ? sample.queries.length - 1 : 0;
  const buttons = (sample ? sample.queries : []).map((query, place) => {
    const button = example(query, () => query);
    button.lang = chosen();
    if (place === last) button.append(element("i", "", words().not_helped));
    return button;
  });
  const any = () => sample.questions[Math.floor(Math.random() * sample.questions.length)];
  $("examples").replaceChildren(...buttons, ...(sample ? [example(words().another, any)] : []));
}

function example(text, query) {
  const button = element("button", "", text);
  button.type = "button";
  button.addEventListener("click", () => {
    $("query").value = query();
    search();
  });
  return button;
}

function request() {
  const body = { query: $("query").value, top_k: 20 };
  const instruction = $("instruction").value.trim();
  if (instruction) body.instruction = instruction;
  if (chosen() === "own") body.texts = $("texts").value.split("\n").filter((line) => line.trim());
  else body.collection = chosen();
  return body;
}

async function search() {
  if (!$("query").value.trim() && chosen() === "store") return; // there is no question of ours for somebody's own files
  const turn = ++state.asked;
  const headers = { "Content-Type": "application/json" };
  const key = $("key").value.trim();
  const collection = chosen();
  if (collection === "own") state.own = $("query").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  busy(true);
  try {
    const response = await fetch("playground/search", { method: "POST", headers, body: JSON.stringify(request()) });
    const answer = await response.json();
    if (turn !== state.asked) return;
    if (response.ok) {
      state.answer = { ...answer, collection };
      complain("");
    } else refuse(response, answer, turn);
  } catch {
    if (turn === state.asked) complain(words().unreachable);
  } finally {
    if (turn === state.asked) busy(false);
  }
  show();
}

function refuse(response, answer, turn) {
  if (response.status === 401) {
    complain($("key").value.trim() ? words().wrong_key : words().unauthorized);
    $("key-row").hidden = false;
    $("key").focus();
  } else if (response.status === 503) {
    complain(words().not_ready);
    const wait = Number(response.headers.get("Retry-After")) || 1;
    setTimeout(() => turn === state.asked && search(), 1000 * wait);
  } else complain(words().errors[answer.error.code] || answer.detail);
}

function busy(on) {
  $("rounds").setAttribute("aria-busy", String(on));
  $("go").setAttribute("aria-disabled", String(on));
}

function complain(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function show() {
  const answer = state.answer;
  $("rounds").hidden = $("behind").hidden = !answer;
  if (!answer) return;
  const n = answer.first.length;
  const threshold = Number($("threshold").value);
  const kept = answer.final.filter((hit) => hit.score >= threshold).length;
  const found = answer.first.filter((hit) => hit.score > 0).length;
  showModel();
  $("first-note").textContent =
    answer.first_stage === "store" ? words().store_note(n, answer.n_documents) : words().first_note(found, answer.n_documents, n - found);
  $("final-note").textContent = threshold > 0 ? words().final_kept(kept, n) : words().final_note(answer.model, n);
  showRight(answer, n);
  const standard = (answer.prompt || []).find((each) => each.kind === "instruction");
  if (standard && !$("instruction").value.trim()) $("instruction").placeholder = standard.text;
  const limit = state.all ? n : Math.min(n, FEW);
  const best = Math.max(...answer.first.map((hit) => hit.score), 1e-9);
  $("first").replaceChildren(
    ...answer.first.slice(0, limit).map((hit, place) => card(hit, { place, key: place, share: hit.score / best, value: hit.score.toFixed(2), note: hit.score > 0 ? "" : words().is_new })),
  );
  $("final").replaceChildren(
    ...answer.final.slice(0, limit).map((hit, place) =>
      card(answer.first[hit.index], { place, key: hit.index, share: hit.score, value: percent(hit.score), from: hit.index, below: hit.score < threshold, note: `log-odds ${hit.log_odds.toFixed(2)}` }),
    ),
  );
  $("all").hidden = n <= FEW;
  $("all").textContent = state.all ? words().fewer : words().all(n);
  $("all").setAttribute("aria-expanded", String(state.all));
  showPanel();
  requestAnimationFrame(draw);
}

function showRight({ right, final, collection }, n) {
  const sample = state.samples[collection];
  $("count").hidden = !sample;
  if (sample) $("count").textContent = words().count(sample.count);
  $("right-note").hidden = !right;
  if (!right) return;
  const after = final.findIndex((hit) => hit.index === right.index);
  $("right-note").textContent = right.index === null ? words().right_lost(n) : words().right(right.index + 1, after + 1);
}

function percent(score) {
  return score >= 0.001 && score <= 0.999 ? `${(100 * score).toFixed(1)} %` : score < 0.5 ? "< 0.1 %" : "> 99.9 %";
}

function card(hit, { place, key, share, value, from, below, note }) {
  const right = state.answer.right && state.answer.right.index === key;
  const item = element("li", [below && "below", right && "right"].filter(Boolean).join(" "));
  const [title, ...rest] = hit.place ? [hit.place, hit.text] : hit.text.split("\n");
  const score = element("span", "score");
  if (from !== undefined) score.append(moved(from + 1, place + 1));
  score.append(element("span", "", value));
  if (note) score.title = note;
  const bar = element("span", "bar");
  bar.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  const button = element("button", "title");
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  const name = element("span"); // a button cannot cut its own lines
  if (right) name.append(rightMark(), " ");
  name.append(...marked(title));
  button.append(name);
  const snippet = element("span", "snippet");
  snippet.append(...marked(rest.join(" ")));
  item.append(element("span", "rank", String(place + 1)), button, score, snippet, bar);
  item.dataset.key = key;
  for (const event of ["mouseenter", "focusin"]) item.addEventListener(event, () => near(key));
  for (const event of ["mouseleave", "focusout"]) item.addEventListener(event, () => near(null));
  item.addEventListener("click", () => toggle(item, button));
  return item;
}

function rightMark() {
  const mark = element("span", "tick", "✓");
  mark.title = words().right_mark;
  mark.setAttribute("role", "img");
  mark.setAttribute("aria-label", mark.title);
  return mark;
}

// Words that the text shares with the query, which is all that the first round sees; single Chinese characters are too many.
function marked(text) {
  const shared = new Array(text.length).fill(false);
  for (const term of state.answer.terms) {
    const han = /^\p{Script=Han}+$/u.test(term);
    if (han && term.length < 2) continue;
    const quoted = term.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    for (const found of text.matchAll(new RegExp(han ? quoted : `(?<![\\p{L}\\p{N}])${quoted}(?![\\p{L}\\p{N}])`, "giu"))) {
      shared.fill(true, found.index, found.index + found[0].length);
    }
  }
  const pieces = [];
  for (let start = 0, end = 0; start < text.length; start = end) {
    while (end < text.length && shared[end] === shared[start]) end += 1;
    pieces.push(shared[start] ? element("b", "", text.slice(start, end)) : text.slice(start, end));
  }
  return pieces;
}

function toggle(item, button) {
  button.setAttribute("aria-expanded", String(item.classList.toggle("open")));
  draw();
}

function moved(from, to) {
  const [direction, sign] = from > to ? ["up", `▲ ${from - to}`] : from < to ? ["down", `▼ ${to - from}`] : ["", "•"];
  const node = element("span", `move ${direction}`, sign);
  node.title = words().moved(from, to);
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", node.title);
  return node;
}

function near(key) {
  for (const node of document.querySelectorAll("#rounds li, #lines path")) {
    node.classList.toggle("near", key !== null && node.dataset.key === String(key));
  }
}

function draw() {
  const box = $("rounds").getBoundingClientRect();
  const places = (list) => new Map([...$(list).children].map((item) => [item.dataset.key, item.getBoundingClientRect()]));
  const left = places("first");
  const right = places("final");
  const paths = [...right].filter(([key]) => left.has(key)).map(([key, end]) => {
    const start = left.get(key);
    const [x1, y1] = [start.right - box.left, start.top + start.height / 2 - box.top];
    const [x2, y2] = [end.left - box.left, end.top + end.height / 2 - box.top];
    const bend = (x2 - x1) / 2;
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`);
    path.setAttribute("class", y2 < y1 - 4 ? "up" : "");
    path.dataset.key = key;
    return path;
  });
  $("lines").replaceChildren(...paths);
}

function showPanel() {
  for (const name of TABS) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", String(name === state.tab));
    tab.tabIndex = name === state.tab ? 0 : -1;
  }
  const prompt = state.answer.prompt;
  const notes = { prompt: prompt ? words().prompt_note : words().no_prompt, curl: words().curl_note };
  $("panel-note").textContent = notes[state.tab] || words().code_note;
  $("copy").hidden = state.tab === "prompt" && !prompt;
  $("panel").setAttribute("aria-labelledby", `tab-${state.tab}`);
  $("code").hidden = state.tab === "prompt" && !prompt;
  if (state.tab === "prompt") $("code").replaceChildren(...(prompt || []).map(part));
  else $("code").textContent = snippet(state.tab);
}

function part({ kind, text }) {
  const node = element(kind === "fixed" ? "span" : "mark", kind, text);
  if (kind !== "fixed") node.dataset.name = words().names[kind];
  return node;
}

function snippet(kind) {
  const key = $("key").value.trim() !== "";
  const instruction = $("instruction").value.trim();
  const query = $("query").value;
  if (kind === "curl") {
    const body = { query, documents: state.answer.first.slice(0, 3).map((hit) => hit.text), top_n: 3, return_documents: true };
    if (instruction) body.instruction = instruction;
    const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
    const auth = key ? `  -H "Authorization: Bearer $QWEN_RERANK_API_KEY" \\\n` : "";
    return `curl -X POST ${base()}/v1/rerank \\\n  -H "Content-Type: application/json" \\\n${auth}  -d '${json}'`;
  }
  const scorer = `HttpScorer(${python(base())}, dialect="qwen-rerank"${key ? ', api_key=os.environ["QWEN_RERANK_API_KEY"]' : ""})`;
  const start = (key ? "import os\n\n" : "") + "from qwen_rerank import HttpScorer\n";
  const threshold = Number($("threshold").value);
  const options = `${threshold ? `, threshold=${threshold}` : ""}${instruction ? `, instruction=${python(instruction)}` : ""}`;
  if (kind === "langchain") {
    return (
      `${start}from qwen_rerank.langchain import QwenRerankCompressor\n\n` +
      `compressor = QwenRerankCompressor(scorer=${scorer}, top_n=3${options})\n` +
      `query = ${python(query)}\n` +
      `documents = compressor.compress_documents(retriever.invoke(query), query)  # retriever: any LangChain retriever`
    );
  }
  return (
    `${start}from qwen_rerank.llama_index import QwenRerankPostprocessor\n\n` +
    `reranker = QwenRerankPostprocessor(scorer=${scorer}, top_n=3${options})\n` +
    `engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[reranker])  # index: any LlamaIndex index\n` +
    `print(engine.query(${python(query)}))`
  );
}

async function copy() {
  const text = state.tab === "prompt" ? (state.answer.prompt || []).map((each) => each.text).join("") : snippet(state.tab);
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = words().copied;
  setTimeout(() => ($("copy").textContent = words().copy), 1500);
}

function turnTab(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  state.tab = TABS[(TABS.indexOf(state.tab) + step + TABS.length) % TABS.length];
  showPanel();
  $(`tab-${state.tab}`).focus();
}

async function start() {
  speak(navigator.language.startsWith("zh") ? "zh" : "en");
  for (const language of ["zh", "en"]) $(`lang-${language}`).addEventListener("click", () => speak(language));
  for (const radio of document.querySelectorAll("input[name=collection]")) {
    radio.addEventListener("change", () => {
      choose(radio.value);
      search();
    });
  }
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    search();
  });
  $("threshold").addEventListener("input", () => {
    $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
    show();
  });
  $("all").addEventListener("click", () => {
    state.all = !state.all;
    show();
  });
  $("copy").addEventListener("click", copy);
  for (const name of TABS) {
    $(`tab-${name}`).addEventListener("keydown", turnTab);
    $(`tab-${name}`).addEventListener("click", () => {
      state.tab = name;
      showPanel();
    });
  }
  addEventListener("resize", draw);
  state.samples = await (await fetch("playground/samples")).json();
  $("of-store").hidden = !state.samples.has_store;
  choose(state.samples.has_store ? "store" : state.language);
  if (state.samples.has_store) askModel();
  search();
}

start();
