"use strict";

/* How strongly each LoRA is applied in each layer at each step. S(t) and the rule of the methods that compare
   are computed here, bit for bit as in klora.core. For all other methods, and for what was applied, the
   server sends the changes. A row of a plan has one code for each layer: the index of its strengths in
   `levels`, the list of {subject, style, colour, words} that the server sends. */
(function(klora) {
    const NOT_RUN = 255;

    /** The nearest whole number, halves to the even one, as numpy.rint. */
    function rint(x) {
        const low = Math.floor(x), rest = x - low;
        return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
    }

    /** numpy.round(x, 12). */
    function rounded(x) {
        return rint(x * 1e12) / 1e12;
    }

    /** The remainder with the sign of the divisor, as in Python. */
    function modulo(a, b) {
        const rest = a % b;
        return rest !== 0 && (rest < 0) !== (b < 0) ? rest + b : rest;
    }

    /** S(t) of every step, eq. (7), or S*(t), eq. (12). */
    function scheduleValues({schedule, alpha, beta, steps}, alphaM) {
        return Float64Array.from({length: steps}, (_, step) => {
            const s = rounded(alpha * (step / steps) + beta);
            return schedule === "s*" ? rounded(modulo(s, alphaM)) : s;
        });
    }

    /** The γ to use: the pair's, none (1), or the user's number. */
    function gammaOf(pair, gamma) {
        return gamma === "auto" ? pair.gamma : gamma === "off" ? 1 : gamma;
    }

    function codeOf(levels, subject, style) {
        return levels.findIndex(level => level.subject === subject && level.style === style);
    }

    /**
     * The rows of a method that compares: the subject where its ratio >= γ · S(t), otherwise the style.
     * @param rule {magnitude, gamma, s}: the magnitude whose ratio counts (null: 1 in all layers), and
     *     whether γ and S(t) count
     * @param pair the answer of /klora/internal/scores
     * @param s S(t) of every step
     * @param gamma the γ to use
     */
    function compared(rule, pair, s, gamma, levels) {
        const {magnitude} = rule;
        const ratios = magnitude === null ? pair.layers.name.map(() => 1) : pair.magnitudes[magnitude].ratio;
        const subject = codeOf(levels, 1, 0), style = codeOf(levels, 0, 1);
        return Array.from(s, value => {
            const threshold = (rule.gamma ? gamma : 1) * (rule.s ? value : 1);
            return Uint8Array.from(ratios, ratio => ratio >= threshold ? subject : style);
        });
    }

    /** The numbers of a text such as "0-3,7". */
    function numbersIn(spans) {
        return spans.split(",").filter(Boolean).flatMap(span => {
            const [first, last = first] = span.split("-").map(Number);
            return Array.from({length: last - first + 1}, (_, i) => first + i);
        });
    }

    /** The rows from the changes that the server sends, as klora.core.changes makes them. */
    function rowsOf({steps, layers, ran, changes}, levels) {
        const rows = Array.from({length: steps}, () => new Uint8Array(layers).fill(NOT_RUN));
        const row = new Uint8Array(layers);
        let next = 0;
        for (const step of numbersIn(ran)) {
            for (; next < changes.length && changes[next][0] === step; next++) {
                const [, [subject, style], changed] = changes[next], code = codeOf(levels, subject, style);
                for (const layer of numbersIn(changed)) row[layer] = code;
            }
            rows[step].set(row);
        }
        return rows;
    }

    /** The shares of subject and style in a row, layers split by strengths; null if the step did not run. */
    function sharesOf(row, levels, members = [...row.keys()]) {
        if (!members.length || row[members[0]] === NOT_RUN) return null;
        const sums = {subject: 0, style: 0};
        for (const layer of members) {
            const {subject, style} = levels[row[layer]];
            if (!subject && !style) continue;
            sums.subject += subject / (subject + style);
            sums.style += style / (subject + style);
        }
        return {subject: sums.subject / members.length, style: sums.style / members.length};
    }

    /** The subject's share of a row; null if the step did not run. */
    function subjectShare(row, levels, members) {
        const shares = sharesOf(row, levels, members);
        return shares && shares.subject;
    }

    /** The steps at which a layer's strengths differ from those at the previous step. */
    function switchesOf(rows, layer) {
        return [...rows.keys()].filter(step => step > 0 && rows[step][layer] !== rows[step - 1][layer]);
    }

    /** A number as the settings accept it: one of its words, or within its bounds; otherwise undefined. */
    function readNumber(text, {words, bounds}) {
        const plain = String(text).trim().toLowerCase();
        if (words.includes(plain)) return plain;
        if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/.test(plain)) return undefined;
        const number = Number(plain);
        return bounds[0] <= number && number <= bounds[1] ? number : undefined;
    }

    Object.assign(klora, {
        NOT_RUN, scheduleValues, gammaOf, codeOf, compared, rowsOf, sharesOf, subjectShare, switchesOf,
        readNumber,
    });
})(globalThis.klora = globalThis.klora || {});
