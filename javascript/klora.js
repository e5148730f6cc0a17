"use strict";

/* The K-LoRA panels of txt2img and img2img. They ask the server once for the files and scores of a pair, and
   draw the rest in the browser. */
(function(klora) {
    const TABS = ["txt2img", "img2img"];
    const DEBOUNCE = 250, TRY_AGAIN = 2500, MOST_PAIRS = 6, MOST_PLANS = 24;
    /** The host's own fields that a plan depends on. */
    const FOLLOWED = ["steps", "seed", "denoising_strength"];
    const panels = {};

    async function ask(route, body, signal) {
        const answer = await fetch(`./klora/internal/${route}`, {
            method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
        });
        if (answer.ok) return answer.json();
        return {problem: `The WebUI answered with status ${answer.status}.`, again: false};
    }

    const field = (tab, name) => gradioApp().querySelector(`#${tab}_${name} input[type=number]`);

    /** The number in one of the host's own fields, or `otherwise` if there is none. */
    function hostNumber(tab, name, otherwise) {
        const value = parseFloat((field(tab, name) || {}).value);
        return Number.isFinite(value) ? value : otherwise;
    }

    function decoded(name) {
        try {
            return decodeURIComponent(name);
        } catch {
            return name;
        }
    }

    /** The prompt of a tab, which trigger words are added to. */
    class Prompt {
        constructor(tab) {
            this.tab = tab;
        }

        get area() {
            return gradioApp().querySelector(`#${this.tab}_prompt textarea`);
        }

        has(word) {
            return this.area.value.toLowerCase().includes(word.toLowerCase());
        }

        add(words) {
            for (const word of words.filter(one => !this.has(one))) {
                const before = this.area.value.replace(/[\s,]+$/, "");
                this.area.value = before ? `${before}, ${word}` : word;
            }
            updateInput(this.area);
        }
    }

    class Panel {
        constructor(tab, root) {
            this.tab = tab;
            this.root = root;
            this.constants = JSON.parse(root.dataset.constants);
            this.values = {...this.constants.defaults};
            this.prompt = new Prompt(tab);
            this.pairs = new Map();
            this.plans = new Map();
            this.wanted = new Map();
            this.lastPlan = null;
            this.card = null;
            this.passes = [];
            this.shown = "planned";
            for (const [name, ...strengths] of [["subject", 1, 0], ["style", 0, 1]]) {
                const {levels} = this.constants;
                root.style.setProperty(`--klora-${name}`, levels[klora.codeOf(levels, ...strengths)].colour);
            }
            this.build();
        }

        build() {
            const {element} = klora;
            this.cardPlace = element("div", {class: "klora-card-place"});
            this.status = element("p", {class: "klora-status", role: "status"});
            this.choices = element("div", {class: "klora-choices", role: "group", "aria-label": "Which map"});
            this.title = element("span", {class: "klora-title"});
            const toggle = {type: "button", class: "klora-choice", "aria-pressed": "false"};
            this.widen = element("button", toggle, "layer names");
            this.widen.addEventListener("click", () => {
                this.map.wide = !this.map.wide;
                this.widen.setAttribute("aria-pressed", String(this.map.wide));
                this.map.draw();
            });
            this.map = new klora.SelectionMap(this.constants);
            const head = element("div", {class: "klora-map-head"}, this.choices, this.title, this.widen);
            this.mapPlace = element("div", {class: "klora-map-place", hidden: true}, head, this.map.root);
            this.root.replaceChildren(this.cardPlace, this.status, this.mapPlace);
        }

        get names() {
            const [subject, style] = ["subject", "style"].map(role => {
                const name = String(this.values[role] ?? "").trim();
                return name === "None" ? "" : name;
            });
            return {subject, style};
        }

        get kScale() {
            const read = klora.readNumber(this.values.k_scale, this.constants.numbers.k_scale);
            return read === undefined ? this.constants.defaults.k_scale : read;
        }

        get pairKey() {
            return JSON.stringify([this.names, this.kScale]);
        }

        get pair() {
            const known = this.pairs.get(this.pairKey);
            return known && known.layers ? known : null;
        }

        /** The values of the controls have changed, by the user or by pasted parameters. */
        changed(values) {
            const before = this.pairKey;
            this.values = values;
            this.shown = "planned";
            if (before !== this.pairKey || !this.card) this.refresh(DEBOUNCE);
            this.redraw();
        }

        /** Ask for the card and then for the scores. Earlier requests are cancelled. */
        refresh(delay = 0) {
            clearTimeout(this.timer);
            if (this.asking) this.asking.abort();
            this.asking = null;
            if (!this.names.subject && !this.names.style) {
                this.card = null;
                this.say("");
                this.redraw();
                return;
            }
            this.timer = setTimeout(() => this.load(), delay);
        }

        async load() {
            const asking = this.asking = new AbortController(), {names, kScale, pairKey} = this;
            try {
                const card = await ask("card", names, asking.signal);
                if (asking.signal.aborted) return;
                const none = {subject: null, style: null, layers: null, checkpoint: null};
                this.card = card.problem ? {...none, problems: [card.problem]} : card;
                this.redraw();
                const scorable = card.layers && card.layers.shared && card.subject.base === card.style.base;
                if (scorable && !this.pairs.has(pairKey)) {
                    this.say("Scoring the pair, which is only done once …");
                    await this.score(names, kScale, pairKey, asking);
                }
                this.say("");
            } catch (error) {
                if (error.name === "AbortError") return;
                this.say("The WebUI does not answer. The card will appear as soon as it does.");
                this.refresh(TRY_AGAIN);
            }
        }

        async score(names, kScale, pairKey, asking) {
            for (;;) {
                const found = await ask("scores", {...names, k_scale: kScale}, asking.signal);
                if (asking.signal.aborted) return;
                if (!found.again) {
                    this.pairs.set(pairKey, found);
                    if (this.pairs.size > MOST_PAIRS) this.pairs.delete(this.pairs.keys().next().value);
                    this.redraw();
                    return;
                }
                this.say(found.problem);
                await new Promise(resolve => setTimeout(resolve, TRY_AGAIN));
                if (asking.signal.aborted) return;
            }
        }

        say(sentence) {
            this.status.textContent = sentence;
            this.status.hidden = !sentence;
        }

        /** Draw once in the next frame, however often this is called until then. */
        redraw() {
            if (this.frame) return;
            this.frame = requestAnimationFrame(() => {
                this.frame = null;
                this.draw();
            });
        }

        draw() {
            this.wanted.clear();
            const plan = this.pair && this.planned();
            this.drawCard(plan);
            const applied = this.applied();
            clearTimeout(this.planTimer);
            if (this.wanted.size && !this.askingPlan) {
                this.planTimer = setTimeout(() => this.loadPlan(), DEBOUNCE);
            }
            if (!applied) this.shown = "planned";
            const view = this.shown === "planned" ? plan : applied;
            this.mapPlace.hidden = !(view && view.rows);
            if (this.mapPlace.hidden) return;
            this.drawChoices(applied);
            this.title.textContent = view.title;
            this.map.show(view);
        }

        drawCard(plan) {
            if (!this.card) {
                this.cardPlace.replaceChildren();
                return;
            }
            const known = this.pairs.get(this.pairKey) || {}, {levels} = this.constants;
            const rows = plan && plan.rows ? plan.rows : [];
            const shares = rows.map(row => klora.subjectShare(row, levels)).filter(share => share !== null);
            const share = shares.length ? shares.reduce((sum, one) => sum + one, 0) / shares.length : null;
            const problems = [known.problem, plan && plan.problem].filter(Boolean).join(" ");
            const recommended = ["subject", "style"].every(role => (this.card[role] || {}).schedule === "s*");
            const offered = recommended && this.values.schedule === "s";
            const gamma = plan && plan.rows ? plan.gamma : known.gamma ?? null;
            const more = {gamma, share, warnings: known.warnings || [], problem: problems, offered};
            const drawn = JSON.stringify([this.card, more]);
            if (drawn !== this.drawnCard || !this.cardPlace.firstChild) {
                const drawnNow = klora.drawCard(this.card, more, this.prompt, () => this.usePreset());
                this.cardPlace.replaceChildren(drawnNow);
                this.drawnCard = drawn;
            }
            this.markWords();
        }

        usePreset() {
            gradioApp().querySelector(`#klora_${this.tab}_preset`).click();
        }

        markWords() {
            for (const chip of this.cardPlace.querySelectorAll("[data-word]")) {
                chip.setAttribute("aria-pressed", String(this.prompt.has(chip.dataset.word)));
            }
        }

        /** The settings of a plan from values by name, or {problem} if one of them is not a number. */
        settingsOf(values, steps, seed) {
            const numbers = {};
            for (const name of ["alpha", "beta", "gamma"]) {
                numbers[name] = klora.readNumber(values[name], this.constants.numbers[name]);
                if (numbers[name] === undefined) {
                    const {label, words, bounds} = this.constants.numbers[name];
                    const allowed = [...words, `a number from ${bounds[0]} to ${bounds[1]}`].join(" or ");
                    return {problem: `${label} must be ${allowed}, not “${values[name]}”.`};
                }
            }
            const beta = numbers.beta === "auto" ? this.constants.schedules[values.schedule] : numbers.beta;
            const {method, schedule} = values, {alpha, gamma} = numbers;
            return {method, schedule, alpha, beta, gamma, steps, seed};
        }

        /** Steps of the whole schedule, and the first one that runs: img2img starts at its noise level. */
        stepsOfRun() {
            const steps = Math.max(1, Math.round(hostNumber(this.tab, "steps", 20)));
            if (this.tab !== "img2img") return {steps, first: 0};
            const strength = Math.min(hostNumber(this.tab, "denoising_strength", 0.75), 0.999);
            const whole = opts.img2img_fix_steps ? Math.trunc(steps / strength) || 0 : steps;
            const run = (opts.img2img_fix_steps ? steps - 1 : Math.trunc(strength * steps)) + 1;
            if (this.values.hires === "restart") return {steps: run, first: 0};
            return {steps: Math.max(whole, run), first: Math.max(whole - run, 0)};
        }

        planned() {
            const seed = hostNumber(this.tab, "seed", -1), {steps, first} = this.stepsOfRun();
            const settings = this.settingsOf(this.values, steps, Math.max(0, Math.trunc(seed)));
            if (settings.problem) return settings;
            const plan = this.planOf(this.pair, this.pairKey, settings);
            if (!plan.rows) {
                const shown = !plan.problem && this.lastPlan && this.lastPlan.pair === this.pair;
                return shown ? this.lastPlan : plan;
            }
            const blank = row => new Uint8Array(row.length).fill(klora.NOT_RUN), {method} = settings;
            const rows = plan.rows.map((row, step) => step < first ? blank(row) : row);
            const unknown = this.constants.seeded.includes(method) && seed < 0;
            const note = unknown ? ", with seed 0 here: Generate draws the real one" : "";
            const title = this.titleOf(settings, plan.gamma) + note;
            this.lastPlan = {...plan, rows, pair: this.pair, method, names: this.names, title};
            return this.lastPlan;
        }

        /**
         * {rows, s, gamma} of a pair. Methods that compare are computed here, others by the server; rows is
         * null until it has answered.
         */
        planOf(pair, pairKey, settings) {
            const {alphaM, comparisons, levels} = this.constants, rule = comparisons[settings.method];
            const s = klora.scheduleValues(settings, alphaM), gamma = klora.gammaOf(pair, settings.gamma);
            if (rule) return {rows: klora.compared(rule, pair, s, gamma, levels), s, gamma};
            const [names, kScale] = JSON.parse(pairKey);
            const seed = this.constants.seeded.includes(settings.method) ? settings.seed : 0;
            const asked = {...names, k_scale: kScale, ...settings, seed};
            const key = JSON.stringify(asked), told = this.plans.get(key);
            if (!told) this.wanted.set(key, asked);
            return {rows: told && !told.problem ? told : null, problem: told && told.problem, s, gamma};
        }

        /** Ask for one of the plans that the last drawing lacked, and draw again, which asks for the next. */
        async loadPlan() {
            const [key, asked] = this.wanted.entries().next().value;
            let wait = 0;
            this.askingPlan = true;
            try {
                const found = await ask("strengths", asked);
                if (found.again) wait = TRY_AGAIN;
                else this.plans.set(key, found.problem ? found : klora.rowsOf(found, this.constants.levels));
                if (this.plans.size > MOST_PLANS) this.plans.delete(this.plans.keys().next().value);
            } catch {
                wait = TRY_AGAIN;
            }
            setTimeout(() => {
                this.askingPlan = false;
                this.redraw();
            }, wait);
        }

        titleOf({method, schedule, alpha, beta, steps}, gamma) {
            const sum = `${klora.short(alpha)} t/T ${beta < 0 ? "−" : "+"} ${klora.short(Math.abs(beta))}`;
            const s = schedule === "s*" ? `S* = (${sum}) mod ${this.constants.alphaM}` : `S = ${sum}`;
            return `${method}, ${s}, γ ${klora.short(gamma)}, ${steps} steps`;
        }

        drawChoices(applied) {
            const choice = (text, pressed, act) => {
                const toggle = {type: "button", class: "klora-choice", "aria-pressed": String(pressed)};
                const button = klora.element("button", toggle, text);
                button.addEventListener("click", () => {
                    act();
                    this.draw();
                });
                return button;
            };
            const batches = new Set(this.passes.map(pass => pass.batch)).size;
            const nameOf = pass => [
                "applied",
                batches > 1 ? `batch ${pass.batch + 1}` : "",
                pass.pass === "hires" ? "hires pass" : "",
            ].filter(Boolean).join(", ");
            const planned = choice("planned", this.shown === "planned", () => {
                this.shown = "planned";
            });
            const passes = (applied ? this.passes : []).map((pass, i) => {
                const pressed = this.shown === "applied" && this.passIndex === i;
                return choice(nameOf(pass), pressed, () => {
                    this.shown = "applied";
                    this.passIndex = i;
                });
            });
            this.choices.replaceChildren(planned, ...passes);
        }

        /** The host has made an image: take what was recorded, if K-LoRA took part. */
        generated(text) {
            let info;
            try {
                info = JSON.parse(text);
            } catch {
                return;
            }
            this.info = info;
            this.passes = (info.extra_generation_params || {})["K-LoRA applied"] || [];
            this.passIndex = 0;
            if (this.passes.length) this.shown = "applied";
            this.redraw();
        }

        /** The chosen recorded pass as the map draws it; null if there is none or its layers are unknown. */
        applied() {
            const pass = this.passes[this.passIndex];
            if (!pass) return null;
            const params = this.info.extra_generation_params, values = {...this.constants.defaults};
            for (const [name, labels] of Object.entries(this.constants.infotext)) {
                const label = labels.find(one => one in params);
                if (label) values[name] = decoded(String(params[label]));
            }
            const [pairKey, pair] = this.pairOf(pass, values);
            if (!pair) return null;
            const seed = (this.info.all_seeds || [0])[pass.batch * (this.info.batch_size || 1)] || 0;
            const settings = this.settingsOf(values, pass.steps, seed);
            const rows = klora.rowsOf(pass, this.constants.levels);
            const view = {rows, pair, method: values.method, names: values};
            if (settings.problem) return {...view, s: null, gamma: null, title: "as applied"};
            const plan = this.planOf(pair, pairKey, settings);
            return {...view, s: plan.s, gamma: plan.gamma, title: this.verdict(rows, plan.rows)};
        }

        /** A sentence about recorded rows; `planned` is null until the planned ones are known. */
        verdict(rows, planned) {
            const ran = [...rows.keys()].filter(step => rows[step][0] !== klora.NOT_RUN);
            const said = `last image: ${ran.length} of ${rows.length} steps ran`;
            if (!planned) return said;
            const differing = step => rows[step].filter((code, layer) => code !== planned[step][layer]);
            const other = ran.reduce((sum, step) => sum + differing(step).length, 0);
            return `${said}, ${other ? `${other} choices differ from the plan` : "all as planned"}`;
        }

        /** [key, scores] of the pair in a recorded pass; empty if they are not known here. */
        pairOf(pass, {subject, style, k_scale}) {
            const kScale = klora.readNumber(k_scale, this.constants.numbers.k_scale);
            const key = JSON.stringify([{subject, style}, kScale]), pair = this.pairs.get(key);
            return pair && pair.layers && pair.layers.name.length === pass.layers ? [key, pair] : [];
        }

        /** Something on the page has changed: see whether it matters here. */
        look() {
            const place = gradioApp().querySelector(`#generation_info_${this.tab} textarea`);
            const info = (place || {}).value || "";
            if (info !== (this.seenInfo ?? "")) {
                this.seenInfo = info;
                this.generated(info);
            }
            const log = (gradioApp().querySelector(`#html_log_${this.tab}`) || {}).textContent;
            if (this.seenLog !== log) {
                this.seenLog = log;
                if (this.card && !this.card.checkpoint) this.refresh(DEBOUNCE);
            }
            const setting = gradioApp().querySelector("#setting_sd_model_checkpoint input");
            const checkpoint = (setting || {}).value + opts.sd_model_checkpoint;
            if (this.seenCheckpoint !== checkpoint) {
                this.seenCheckpoint = checkpoint;
                if (this.card) this.refresh();
            }
            const fields = FOLLOWED.map(name => hostNumber(this.tab, name, null)).join();
            if (this.seenFields !== fields) {
                this.seenFields = fields;
                if (this.card) this.redraw();
            }
        }
    }

    /** The page calls this when a control of the panel changes, with the values of all controls by name. */
    klora.changed = function(tab, names, values) {
        const panel = panelOf(tab);
        if (panel) panel.changed(Object.fromEntries(names.map((name, i) => [name, values[i]])));
        return [];
    };

    function panelOf(tab) {
        const root = gradioApp().querySelector(`#klora_${tab}_view [data-constants]`);
        if (root && (!panels[tab] || panels[tab].root !== root)) panels[tab] = new Panel(tab, root);
        return panels[tab];
    }

    const look = () => TABS.forEach(tab => panels[tab] && panels[tab].look());

    if (globalThis.onUiLoaded) {
        onUiLoaded(() => {
            TABS.forEach(panelOf);
            const followed = TABS.map(tab => FOLLOWED.map(name => `#${tab}_${name}`)).flat().join();
            const prompts = TABS.map(tab => `#${tab}_prompt`).join();
            gradioApp().addEventListener("input", event => {
                if (event.target.closest(followed)) look();
                if (event.target.closest(prompts)) {
                    TABS.forEach(tab => panels[tab] && panels[tab].markWords());
                }
            });
        });
        onAfterUiUpdate(look);
    }
})(globalThis.klora = globalThis.klora || {});
