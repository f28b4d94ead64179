//! The host's part of a serving engine: the requests, and their tokens of the next step.
//!
//! `decode_loop.py` has the same engine, so that both programs do the same work.

pub const MAX_REQUESTS: usize = 1024;
/// The most tokens of a step: one of each request, and those of prompts.
pub const MAX_TOKENS: usize = MAX_REQUESTS + PROMPT_TOKENS;
const PROMPT_TOKENS: usize = 2048;
/// The tokens of a block of the cache, and the most blocks of a request.
pub const BLOCK: u32 = 16;
pub const BLOCKS: usize = 128;
const VOCABULARY: u32 = 32_000;

/// A request. Its index among the live requests is its row.
pub struct Request {
    pub seed: u64,
    prompt: u32,
    /// The length at which the request ends.
    total: u32,
    /// The tokens of earlier steps, and those of this step.
    pub computed: u32,
    pub scheduled: u32,
    blocks: u32,
    /// The row in the last two steps, by the parity of the step.
    rows: [u32; 2],
    /// The row in the step whose result this step reads.
    source: u32,
}

impl Request {
    /// The tokens of this step, and their positions.
    ///
    /// `sampled` is the result of the step before the last. The engine prepares a step while the
    /// device works on the last one, so there is no newer result. A prompt takes two steps, the
    /// second with one token, so that a result exists when it is needed.
    pub fn tokens(&self, sampled: &[u32]) -> impl Iterator<Item = (i32, u32)> {
        let decodes = self.computed >= self.prompt;
        let decoded = if decodes { sampled[self.source as usize] % VOCABULARY } else { 0 };
        let token = move |position| match decodes {
            true => decoded,
            false => mix((self.seed as u32).wrapping_add(position)) % VOCABULARY,
        };
        (self.computed..self.computed + self.scheduled).map(move |at| (token(at) as i32, at))
    }

    /// A number from 0 to 255 for a sampling parameter.
    pub fn parameter(&self, number: u32) -> f32 {
        (self.seed >> (8 * number) & 255) as f32
    }
}

/// The live requests and their blocks.
pub struct Engine {
    /// The number of the step, from 1 on.
    pub step: u64,
    pub live: Vec<Request>,
    /// The most live requests.
    requests: usize,
    /// The blocks of the cache of each row.
    table: Vec<i32>,
    /// The last step that changed the blocks or parameters of each row.
    changed: Vec<u64>,
    free: Vec<i32>,
    random: u64,
}

impl Engine {
    pub fn new(requests: usize) -> Engine {
        Engine {
            step: 0,
            live: Vec::with_capacity(MAX_REQUESTS),
            requests,
            table: vec![0; MAX_REQUESTS * BLOCKS],
            changed: vec![0; MAX_REQUESTS],
            free: (0..(MAX_REQUESTS * BLOCKS) as i32).rev().collect(),
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Xorshift, by Marsaglia.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The blocks of the cache of a row.
    pub fn blocks(&self, row: usize) -> &[i32] {
        &self.table[row * BLOCKS..(row + 1) * BLOCKS]
    }

    /// Returns whether the blocks or parameters of a row have changed since a step.
    pub fn has_changed(&self, row: usize, since: u64) -> bool {
        self.changed[row] > since
    }

    /// Schedules the next step: some requests end, new ones begin, the others have one more token.
    pub fn schedule(&mut self) {
        self.step += 1;
        for request in &mut self.live {
            request.computed += request.scheduled;
            request.scheduled = request.prompt.saturating_sub(request.computed).max(1);
        }
        let mut row = 0;
        while row < self.live.len() {
            match self.live[row].computed >= self.live[row].total {
                true => self.end(row),
                false => row += 1,
            }
        }
        self.admit();
        let parity = (self.step % 2) as usize;
        for row in 0..self.live.len() {
            let request = &mut self.live[row];
            request.source = std::mem::replace(&mut request.rows[parity], row as u32);
            let blocks = (request.computed + request.scheduled).div_ceil(BLOCK);
            while request.blocks < blocks {
                let block = self.free.pop().expect("there are enough for all rows");
                self.table[row * BLOCKS + request.blocks as usize] = block;
                request.blocks += 1;
                self.changed[row] = self.step;
            }
        }
    }

    /// Ends a request. The last request takes its row.
    fn end(&mut self, row: usize) {
        let ended = self.live.swap_remove(row);
        let start = row * BLOCKS;
        self.free.extend_from_slice(&self.table[start..start + ended.blocks as usize]);
        let last = self.live.len() * BLOCKS;
        self.table.copy_within(last..last + BLOCKS, start);
        self.changed[row] = self.step;
    }

    /// Begins new requests, as far as there is room for their prompts.
    fn admit(&mut self) {
        let drawn = self.draw();
        let few = self.live.len() * 4 < self.requests * 3;
        let most = if few { self.requests } else { drawn as usize % 4 };
        let mut room = PROMPT_TOKENS as u32;
        for _ in 0..most {
            if self.live.len() == self.requests || room < 512 {
                break;
            }
            let seed = self.draw();
            let prompt = 2 + (seed >> 8) as u32 % 511;
            let total = prompt + 16 + (seed >> 24) as u32 % 257;
            let row = self.live.len();
            self.table[row * BLOCKS..(row + 1) * BLOCKS].fill(0);
            self.changed[row] = self.step;
            let (computed, scheduled) = (0, prompt - 1);
            room -= scheduled;
            let (blocks, rows, source) = (0, [0; 2], 0);
            let request =
                Request { seed, prompt, total, computed, scheduled, blocks, rows, source };
            self.live.push(request);
        }
    }
}

/// Mixes the bits of a word: "lowbias32", by Wellons.
pub fn mix(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x7feb_352d);
    let word = (word ^ word >> 15).wrapping_mul(0x846c_a68b);
    word ^ word >> 16
}
