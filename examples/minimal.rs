//! One sequence, one layer, from Rust without a crate: 8192 random prompt tokens, then decode steps.
//! Build: rustc --edition 2021 -O minimal.rs -L FOLDER_OF_LIBVATTN
use std::ffi::{c_char, c_void, CStr, CString};
use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};

/// vattn_append_params of vattn.h.
#[repr(C)]
struct AppendParams {
    struct_size: usize,
    layer: i32,
    num_queries: i32,
    num_tokens: i64,
    k: *const f32,
    v: *const f32,
    q: *const f32,
    strides: [i64; 6], // of k, v and q: by token, by head
}

/// vattn_attend_params of vattn.h.
#[repr(C)]
struct AttendParams {
    struct_size: usize,
    layer: i32,
    num_tokens: i32,
    out_dtype: i32,
    score_heads: i32,
    q: *const f32,
    k_new: *const f32,
    v_new: *const f32,
    scores: *const c_void,
    scores_stride: i64,
    out: *mut f32,
    lse: *mut f32,
    verdict: *mut i32,
    error: *mut f32,
    selected: *mut i32,
    fetched: *mut i32,
    looks: *mut i32,
    middle: *mut i64,
    timeline: *mut u64,
    scores_dtype: i32,
    policy: i32,
}

#[link(name = "vattn")]
extern "C" {
    fn vattn_last_error() -> *const c_char;
    fn vattn_code_name(code: i32) -> *const c_char;
    fn vattn_runtime_create_json(json: *const c_char, out: *mut *mut c_void) -> i32;
    fn vattn_runtime_destroy(runtime: *mut c_void);
    fn vattn_sequence_create(runtime: *mut c_void, options: *const c_void, out: *mut *mut c_void) -> i32;
    fn vattn_sequence_destroy(sequence: *mut c_void);
    fn vattn_append_params_init(params: *mut AppendParams, size: usize);
    fn vattn_append(sequence: *mut c_void, params: *const AppendParams) -> i32;
    fn vattn_batch_create(runtime: *mut c_void, slots: i32, out: *mut *mut c_void) -> i32;
    fn vattn_batch_destroy(batch: *mut c_void);
    fn vattn_batch_set(batch: *mut c_void, slot: i32, sequence: *mut c_void) -> i32;
    fn vattn_batch_begin_step(batch: *mut c_void, new_tokens: i32, stream: *mut c_void) -> i32;
    fn vattn_attend_params_init(params: *mut AttendParams, size: usize);
    fn vattn_attend(batch: *mut c_void, params: *const AttendParams, stream: *mut c_void) -> i32;
}

const PROMPT: usize = 8192;
const Q_HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const VERDICTS: [&str; 4] = ["exact", "verified", "dense", "best effort"];

/// The library's own text as the error of a call that did not return VATTN_OK.
fn check(code: i32) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let text = |chars| unsafe { CStr::from_ptr(chars) }.to_string_lossy().into_owned();
    Err(unsafe { format!("{}: {}", text(vattn_code_name(code)), text(vattn_last_error())) })
}

/// The handle that a call writes to its last argument.
fn made(create: impl FnOnce(*mut *mut c_void) -> i32) -> Result<*mut c_void, String> {
    let mut handle = null_mut();
    check(create(&mut handle)).map(|()| handle)
}

/// `count` values within half of `scale` around 0, from a linear congruential generator.
fn random(state: &mut u64, count: usize, scale: f32) -> Vec<f32> {
    let mut next = || {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        scale * ((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
    };
    (0..count).map(|_| next()).collect()
}

fn main() -> Result<(), String> {
    let options = CString::new(format!(
        r#"{{"num_q_heads": {Q_HEADS}, "num_kv_heads": {KV_HEADS}, "head_dim_k": {DIM},
            "head_dim_v": {DIM}, "dtype": "f32"}}"#
    ))
    .unwrap();
    let mut state = 1;
    let k = random(&mut state, PROMPT * KV_HEADS * DIM, 4.0);
    let v = random(&mut state, PROMPT * KV_HEADS * DIM, 2.0);
    unsafe {
        let runtime = made(|out| vattn_runtime_create_json(options.as_ptr(), out))?;
        let sequence = made(|out| vattn_sequence_create(runtime, null(), out))?;
        let mut prompt: AppendParams = zeroed();
        vattn_append_params_init(&mut prompt, size_of::<AppendParams>());
        prompt.num_tokens = PROMPT as i64;
        prompt.k = k.as_ptr();
        prompt.v = v.as_ptr();
        check(vattn_append(sequence, &prompt))?;

        let batch = made(|out| vattn_batch_create(runtime, 1, out))?;
        check(vattn_batch_set(batch, 0, sequence))?;
        let mut out = vec![0f32; Q_HEADS * DIM];
        for step in 0..4 {
            let q = random(&mut state, Q_HEADS * DIM, 4.0);
            let (mut verdict, mut selected, mut middle) = ([0; Q_HEADS], [0; KV_HEADS], [0; KV_HEADS]);
            let mut params: AttendParams = zeroed();
            vattn_attend_params_init(&mut params, size_of::<AttendParams>());
            params.q = q.as_ptr();
            params.k_new = k.as_ptr(); // k and v serve as those of the new token, too
            params.v_new = v.as_ptr();
            params.out = out.as_mut_ptr();
            params.verdict = verdict.as_mut_ptr();
            params.selected = selected.as_mut_ptr();
            params.middle = middle.as_mut_ptr();
            check(vattn_batch_begin_step(batch, 1, null_mut()))?;
            check(vattn_attend(batch, &params, null_mut()))?;
            println!(
                "step {step}: head 0 is {}, read {:.1} % of {} rows in the middle",
                VERDICTS[verdict[0] as usize],
                100.0 * selected[0] as f64 / middle[0] as f64,
                middle[0]
            );
        }
        vattn_batch_destroy(batch);
        vattn_sequence_destroy(sequence);
        vattn_runtime_destroy(runtime);
    }
    Ok(())
}
